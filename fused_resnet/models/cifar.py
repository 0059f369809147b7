"""The CIFAR networks of He et al. 2015, section 4.2: depth 6n + 2, for 32x32 images, and their plain twins.

A 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels on 32x32, 16x16 and 8x8 positions, a global
average and a linear layer: `resnet20`, `32`, `44`, `56`, `110`, `1202`; without shortcuts `plain20` to `plain110`.

Every constructor takes `weights` (a path or a state_dict), `progress` and the arguments of `CifarResNet`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fused_resnet.models.plain import PlainBlock
from fused_resnet.models.resnet import initialise
from fused_resnet.models.weights import Weights, load_weights
from fused_resnet.nn import BasicBlock, _stages
from fused_resnet.nn.blocks import conv1x1, conv3x3
from fused_resnet.nn.guard import FusedUnit, why_stock

_WIDTHS = (16, 32, 64)
_SHORTCUTS = ("A", "B", None)

NormLayer = Callable[..., nn.Module]


class PadShortcut(nn.Module):
    """Option A: every `stride`-th row and column, and zeros in the channels that x does not have. No parameters.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: channels of the output, the last `planes - inplanes` of them zero.
        stride: of rows and columns.
    """

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.extra = planes - inplanes
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.extra])

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


class CifarResNet(FusedUnit):
    """A residual or plain network for small images, usually 32x32.

    Children: `conv1 bn1 relu layer1 layer2 layer3 avgpool fc`.

    Args:
        blocks: n, the number of blocks in each of the three stages; the depth is 6n + 2.
        num_classes: outputs of the last layer.
        in_channels: channels of the images, of shape (N, in_channels, H, W).
        shortcut: what a block does where width and extent change: "A" subsamples and pads with zero channels (the
            paper's choice, no parameters), "B" is a 1x1 convolution with batch norm. None: no shortcuts at all, plain.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``. With another one
            the blocks run stock.

    Raises:
        ValueError: no blocks, or another `shortcut`.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.
    """

    fused_norms: ClassVar[tuple[str, ...]] = ("bn1",)
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: str | None = "A",
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"CifarResNet: expected at least one block in each stage, got {blocks}")
        if shortcut not in _SHORTCUTS:
            raise ValueError(f"CifarResNet: expected shortcut to be 'A', 'B' or None, got {shortcut!r}")
        first, second, third = _WIDTHS
        self.conv1 = conv3x3(in_channels, first)
        self.bn1 = norm_layer(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, first, first, 1, shortcut, norm_layer)
        self.layer2 = _stage(blocks, first, second, 2, shortcut, norm_layer)
        self.layer3 = _stage(blocks, second, third, 2, shortcut, norm_layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(third, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():
            x = self._stem_stock(x)
        else:
            x = self._stem_stock(x) if why_stock(self, x) is not None else self._stem_fused(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        logits: Tensor = self.fc(x)
        return logits

    def _stem_fused(self, x: Tensor) -> Tensor:
        return _stages.norm_act(_stages.conv_or_call(_stages.enter(x), self.conv1), self.bn1)

    def _stem_stock(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        activated: Tensor = self.relu(x)
        return activated


def _stage(
    blocks: int, inplanes: int, planes: int, stride: int, shortcut: str | None, norm_layer: NormLayer
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(blocks):
        width, step = (inplanes, stride) if index == 0 else (planes, 1)
        if shortcut is None:
            layers.append(PlainBlock(width, planes, step, norm_layer))
        else:
            downsample = _shortcut(shortcut, width, planes, step, norm_layer)
            layers.append(BasicBlock(width, planes, step, downsample, norm_layer=norm_layer))
    return nn.Sequential(*layers)


def _shortcut(option: str, inplanes: int, planes: int, stride: int, norm_layer: NormLayer) -> nn.Module | None:
    if stride == 1 and inplanes == planes:
        return None
    if option == "A":
        return PadShortcut(inplanes, planes, stride)
    return nn.Sequential(conv1x1(inplanes, planes, stride), norm_layer(planes))


def _cifar(depth: int, weights: Weights, progress: bool, kwargs: dict[str, Any]) -> CifarResNet:
    model = CifarResNet((depth - 2) // 6, **kwargs)
    load_weights(model, weights, progress)
    return model


def resnet20(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 million parameters, 8.75% error on CIFAR-10 in the paper."""
    return _cifar(20, weights, progress, kwargs)


def resnet32(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-32: 0.46 million parameters, 7.51% error."""
    return _cifar(32, weights, progress, kwargs)


def resnet44(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-44: 0.66 million parameters, 7.17% error."""
    return _cifar(44, weights, progress, kwargs)


def resnet56(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 0.85 million parameters, 6.97% error."""
    return _cifar(56, weights, progress, kwargs)


def resnet110(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-110: 1.7 million parameters, 6.43% error; trains with a warm-up at learning rate 0.01."""
    return _cifar(110, weights, progress, kwargs)


def resnet1202(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-1202: 19.4 million parameters, 7.93% error."""
    return _cifar(1202, weights, progress, kwargs)


def _plain(depth: int, weights: Weights, progress: bool, kwargs: dict[str, Any]) -> CifarResNet:
    if "shortcut" in kwargs:
        raise TypeError(f"plain{depth}() has no shortcuts, got shortcut={kwargs['shortcut']!r}")
    return _cifar(depth, weights, progress, {**kwargs, "shortcut": None})


def plain20(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-20 without shortcuts."""
    return _plain(20, weights, progress, kwargs)


def plain32(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-32 without shortcuts."""
    return _plain(32, weights, progress, kwargs)


def plain44(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-44 without shortcuts."""
    return _plain(44, weights, progress, kwargs)


def plain56(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-56 without shortcuts: it trains worse than Plain-20, which is why there are residuals."""
    return _plain(56, weights, progress, kwargs)


def plain110(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> CifarResNet:
    """ResNet-110 without shortcuts."""
    return _plain(110, weights, progress, kwargs)
