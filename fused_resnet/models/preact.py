"""Pre-activation ResNets of He et al. 2016, "Identity Mappings in Deep Residual Networks".

ImageNet: `preresnet18`, `34`, `50`, `101`, `152`, `200`. The stem is a 7x7 convolution and a max-pool; the first
normalisation and relu belong to the first block, and one more pair follows the last block. In bottlenecks the stride
sits in the 3x3 convolution, as everywhere in this package (the paper's own code put it in the first 1x1). Layer for
layer these are timm's ``resnetv2_*``.

CIFAR: `cifar_preresnet110` of basic blocks, `cifar_preresnet164` and `cifar_preresnet1001` of bottlenecks: three stages
of 16, 32 and 64 planes on 32x32 images. Where a block changes width or extent its shortcut is a 1x1 convolution of the
activated tensor.

Every constructor takes `weights` (a path or a state_dict) and the arguments of its class.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fused_resnet.models.resnet import initialise
from fused_resnet.models.weights import Weights, load_weights
from fused_resnet.nn import PreActBasicBlock, PreActBottleneck, _stages
from fused_resnet.nn.blocks import conv1x1, conv3x3
from fused_resnet.nn.guard import FusedUnit, why_stock

Block = type[PreActBasicBlock | PreActBottleneck]
NormLayer = Callable[..., nn.Module] | None


class _PreActNet(FusedUnit):
    """Stages of pre-activation blocks, then `bn`, `relu`, `avgpool` and `fc`."""

    fused_norms: ClassVar[tuple[str, ...]] = ("bn",)
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def _make_layer(
        self, block: Block, inplanes: int, planes: int, blocks: int, stride: int, norm_layer: NormLayer
    ) -> nn.Sequential:
        width = planes * block.expansion
        downsample = conv1x1(inplanes, width, stride) if stride != 1 or inplanes != width else None
        layers: list[nn.Module] = [block(inplanes, planes, stride, downsample, norm_layer)]
        layers += [block(width, planes, 1, None, norm_layer) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _make_head(self, width: int, num_classes: int, norm_layer: NormLayer) -> None:
        self.bn = nn.BatchNorm2d(width) if norm_layer is None else norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, num_classes)

    def _head(self, x: Tensor) -> Tensor:
        if is_scripting():
            x = self.relu(self.bn(x))
        else:
            x = self.relu(self.bn(x)) if why_stock(self, x) is not None else _stages.norm_act(x, self.bn)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        logits: Tensor = self.fc(x)
        return logits


class PreActResNet(_PreActNet):
    """A pre-activation ResNet for images of shape (N, 3, H, W).

    Children: `conv1 maxpool layer1 layer2 layer3 layer4 bn relu avgpool fc`.

    Args:
        block: `PreActBasicBlock` or `PreActBottleneck`.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.
    """

    def __init__(
        self, block: Block, layers: Sequence[int], num_classes: int = 1000, norm_layer: NormLayer = None
    ) -> None:
        super().__init__()
        if len(layers) != 4:
            raise ValueError(f"PreActResNet: expected layers of length 4, got {list(layers)}")
        wide = block.expansion
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, 64, layers[0], 1, norm_layer)
        self.layer2 = self._make_layer(block, 64 * wide, 128, layers[1], 2, norm_layer)
        self.layer3 = self._make_layer(block, 128 * wide, 256, layers[2], 2, norm_layer)
        self.layer4 = self._make_layer(block, 256 * wide, 512, layers[3], 2, norm_layer)
        self._make_head(512 * wide, num_classes, norm_layer)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self._head(x)


class CifarPreActResNet(_PreActNet):
    """A pre-activation ResNet for small images, usually 32x32.

    Children: `conv1 layer1 layer2 layer3 bn relu avgpool fc`.

    Args:
        block: `PreActBasicBlock` (two convolutions) or `PreActBottleneck` (three).
        blocks: in each of the three stages.
        num_classes: outputs of the last layer.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.
    """

    def __init__(self, block: Block, blocks: int, num_classes: int = 10, norm_layer: NormLayer = None) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"CifarPreActResNet: expected at least one block in each stage, got {blocks}")
        wide = block.expansion
        self.conv1 = conv3x3(3, 16)
        self.layer1 = self._make_layer(block, 16, 16, blocks, 1, norm_layer)
        self.layer2 = self._make_layer(block, 16 * wide, 32, blocks, 2, norm_layer)
        self.layer3 = self._make_layer(block, 32 * wide, 64, blocks, 2, norm_layer)
        self._make_head(64 * wide, num_classes, norm_layer)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self._head(x)


def _imagenet(
    block: Block, layers: list[int], weights: Weights, progress: bool, kwargs: dict[str, Any]
) -> PreActResNet:
    model = PreActResNet(block, layers, **kwargs)
    load_weights(model, weights, progress)
    return model


def _cifar(block: Block, blocks: int, weights: Weights, progress: bool, kwargs: dict[str, Any]) -> CifarPreActResNet:
    model = CifarPreActResNet(block, blocks, **kwargs)
    load_weights(model, weights, progress)
    return model


def preresnet18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18."""
    return _imagenet(PreActBasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def preresnet34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-34."""
    return _imagenet(PreActBasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def preresnet50(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50."""
    return _imagenet(PreActBottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def preresnet101(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-101."""
    return _imagenet(PreActBottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def preresnet152(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-152."""
    return _imagenet(PreActBottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def preresnet200(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-200."""
    return _imagenet(PreActBottleneck, [3, 24, 36, 3], weights, progress, kwargs)


def cifar_preresnet110(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarPreActResNet:
    """Pre-activation ResNet-110 for CIFAR."""
    return _cifar(PreActBasicBlock, 18, weights, progress, kwargs)


def cifar_preresnet164(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarPreActResNet:
    """Pre-activation ResNet-164 for CIFAR."""
    return _cifar(PreActBottleneck, 18, weights, progress, kwargs)


def cifar_preresnet1001(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarPreActResNet:
    """Pre-activation ResNet-1001 for CIFAR."""
    return _cifar(PreActBottleneck, 111, weights, progress, kwargs)
