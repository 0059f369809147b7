"""torchvision's ResNets: constructors, arguments, names, initial weights and errors, on fused blocks.

Every constructor takes `weights` (a path, a state_dict, or an entry of the model's torchvision weights enum),
`progress` (a bar while such an entry's file is fetched) and the arguments of `ResNet`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fused_resnet.models.weights import Weights, WeightsEntry, load_weights
from fused_resnet.nn import BasicBlock, Bottleneck, _stages
from fused_resnet.nn.blocks import conv1x1
from fused_resnet.nn.guard import FusedUnit, why_stock


class ResNet(FusedUnit):
    """A residual network for images of shape (N, 3, H, W), with torchvision's children and state_dict keys.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start each block's last batch norm at weight zero, so that blocks start as identities.
        groups, width_per_group: of the blocks (ResNeXt, wide ResNet).
        replace_stride_with_dilation: for each of the last three stages, dilate instead of striding.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``. With another one
            the blocks run stock.

    Raises:
        ValueError: `replace_stride_with_dilation` is not of length 3; groups or width with `BasicBlock`.
        NotImplementedError: dilation with `BasicBlock`.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015.
    """

    fused_norms: ClassVar[tuple[str, ...]] = ("bn1",)
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self._norm_layer = norm_layer
        self.inplanes = 64
        self.dilation = 1
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self)
        if zero_init_residual:
            for m in self.modules():
                last = m.bn3 if isinstance(m, Bottleneck) else m.bn2 if isinstance(m, BasicBlock) else None
                if last is not None and isinstance(last.weight, Tensor):
                    nn.init.constant_(last.weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        downsample = None
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                norm_layer(planes * block.expansion),
            )
        groups, width = self.groups, self.base_width
        layers: list[nn.Module] = [
            block(self.inplanes, planes, stride, downsample, groups, width, previous_dilation, norm_layer)
        ]
        self.inplanes = planes * block.expansion
        layers += [
            block(self.inplanes, planes, 1, None, groups, width, self.dilation, norm_layer) for _ in range(1, blocks)
        ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if is_scripting():
            x = self._stem_stock(x)
        else:
            x = self._stem_stock(x) if why_stock(self, x) is not None else self._stem_fused(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        logits: Tensor = self.fc(x)
        return logits

    def _stem_fused(self, x: Tensor) -> Tensor:
        z = _stages.conv_or_call(_stages.enter(x), self.conv1)
        return _stages.norm_relu_pool_or_call(z, self.bn1, self.maxpool)

    def _stem_stock(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        pooled: Tensor = self.maxpool(x)
        return pooled


def initialise(model: nn.Module) -> None:
    """He et al.'s initial weights, drawn in the order of `model.modules()`, as torchvision draws them."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
            for parameter, value in ((m.weight, 1), (m.bias, 0)):
                if parameter is not None:
                    nn.init.constant_(parameter, value)


def _overwrite_named_param(kwargs: dict[str, Any], name: str, value: Any) -> None:
    if kwargs.setdefault(name, value) != value:
        raise ValueError(f"The parameter '{name}' expected value {value} but got {kwargs[name]} instead.")


def _resnet(
    enum: str,
    block: type[BasicBlock | Bottleneck],
    layers: list[int],
    weights: Weights,
    progress: bool,
    kwargs: dict[str, Any],
) -> ResNet:
    """`enum` is the name of torchvision's weights enum for this model: entries of another one do not fit."""
    if isinstance(weights, WeightsEntry):
        if type(weights).__name__ != enum:
            raise TypeError(f"Invalid Weight class provided; expected {enum} but received {type(weights).__name__}.")
        entry: Any = weights
        _overwrite_named_param(kwargs, "num_classes", len(entry.meta["categories"]))
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        load_weights(model, weights, progress)
    return model


def resnet18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18."""
    return _resnet("ResNet18_Weights", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def resnet34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34."""
    return _resnet("ResNet34_Weights", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def resnet50(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (v1.5: the stride sits in the 3x3)."""
    return _resnet("ResNet50_Weights", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnet101(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (v1.5)."""
    return _resnet("ResNet101_Weights", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnet152(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (v1.5)."""
    return _resnet("ResNet152_Weights", Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def resnext50_32x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of width 4."""
    _overwrite_named_param(kwargs, "groups", 32)
    _overwrite_named_param(kwargs, "width_per_group", 4)
    return _resnet("ResNeXt50_32X4D_Weights", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnext101_32x8d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of width 8."""
    _overwrite_named_param(kwargs, "groups", 32)
    _overwrite_named_param(kwargs, "width_per_group", 8)
    return _resnet("ResNeXt101_32X8D_Weights", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnext101_64x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of width 4."""
    _overwrite_named_param(kwargs, "groups", 64)
    _overwrite_named_param(kwargs, "width_per_group", 4)
    return _resnet("ResNeXt101_64X4D_Weights", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def wide_resnet50_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2: inner width doubled."""
    _overwrite_named_param(kwargs, "width_per_group", 128)
    return _resnet("Wide_ResNet50_2_Weights", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def wide_resnet101_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2: inner width doubled."""
    _overwrite_named_param(kwargs, "width_per_group", 128)
    return _resnet("Wide_ResNet101_2_Weights", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)
