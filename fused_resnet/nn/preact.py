"""The pre-activation residual blocks of He et al. 2016: batch norm and relu stand before each convolution."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from fused_resnet.nn import _stages
from fused_resnet.nn._block import preact_block
from fused_resnet.nn.blocks import FusedBlock, conv1x1, conv3x3


class _PreActBlock(FusedBlock):
    """What both blocks do fused: one operator, or one for each convolution and what stands before it."""

    downsample: nn.Module | None

    def _forward_fused(self, x: Tensor) -> Tensor:
        children = self.__dict__["_modules"]
        convs = [children[name] for name in self.fused_convs]
        norms = [children[name] for name in self.fused_norms]
        y = preact_block(x, convs, norms, self.downsample)
        if y is not None:
            return y
        if self.downsample is None:
            z, shortcut = _stages.norm_act_conv(x, norms[0], convs[0]), x
        else:
            activated = _stages.norm_act(x, norms[0])
            z, shortcut = _stages.conv(activated, convs[0]), _stages.conv_or_call(activated, self.downsample)
        for norm, conv in zip(norms[1:], convs[1:], strict=True):
            z = _stages.norm_act_conv(z, norm, conv)
        z += shortcut
        return z


class PreActBasicBlock(_PreActBlock):
    """`conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut`, both convolutions 3x3.

    The shortcut is x, or `downsample(relu(bn1(x)))` where the block changes extent or width.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: channels of both convolutions and of the output.
        stride: of the first convolution.
        downsample: shortcut branch, usually a 1x1 convolution; None is the identity.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.

    Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016.
    """

    expansion: int = 1
    fused_convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2")
    fused_norms: ClassVar[tuple[str, ...]] = ("bn1", "bn2")
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _forward_stock(self, x: Tensor) -> Tensor:
        shortcut = x
        out: Tensor = self.relu(self.bn1(x))
        if self.downsample is not None:
            shortcut = self.downsample(out)

        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))

        out += shortcut
        return out


class PreActBottleneck(_PreActBlock):
    """`conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x))))))))) + shortcut`: 1x1, 3x3 (with the stride) and 1x1.

    The shortcut is x, or `downsample(relu(bn1(x)))` where the block changes extent or width.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: inner width, a quarter of the output's channels.
        stride: of the 3x3 convolution.
        downsample: shortcut branch, usually a 1x1 convolution; None is the identity.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.

    Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016.
    """

    expansion: int = 4
    fused_convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2", "conv3")
    fused_norms: ClassVar[tuple[str, ...]] = ("bn1", "bn2", "bn3")
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, planes)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn3 = norm_layer(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _forward_stock(self, x: Tensor) -> Tensor:
        shortcut = x
        out: Tensor = self.relu(self.bn1(x))
        if self.downsample is not None:
            shortcut = self.downsample(out)

        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))

        out += shortcut
        return out
