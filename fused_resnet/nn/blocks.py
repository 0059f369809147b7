"""The residual blocks of He et al. 2015 with torchvision's children, names and arguments, and a fused forward."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fused_resnet.nn import _stages
from fused_resnet.nn._block import residual_block
from fused_resnet.nn.guard import FusedUnit, why_stock


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the image's extent at stride 1."""
    return nn.Conv2d(
        inplanes, planes, kernel_size=3, stride=stride, padding=dilation, groups=groups, bias=False, dilation=dilation
    )


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(inplanes, planes, kernel_size=1, stride=stride, bias=False)


class FusedBlock(FusedUnit):
    """A unit with one input: `_forward_fused` reads the children, `_forward_stock` calls them, the guard chooses."""

    memory: str = "keep"  # for backward: `set_memory`

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():  # the script compiler skips the other branch, but not what follows an early return
            y = self._forward_stock(x)
        else:
            y = self._forward_stock(x) if why_stock(self, x) is not None else self._forward_fused(x)
        return y

    def _forward_fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward_stock(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BasicBlock(FusedBlock):
    """Two 3x3 convolutions and a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    The children are plain modules, for state_dict, optimiser groups and initialisation; `forward` reads them and runs
    the fused operators, or calls them one by one where `fused_resnet.nn.guard.why_stock` says so.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: channels of both convolutions and of the output.
        stride: of the first convolution.
        downsample: shortcut branch; None is the identity. Sequential(Conv2d, BatchNorm2d) is fused, any other module
            is called.
        groups, base_width, dilation: only their defaults are allowed.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``. Blocks with
            another one run stock.

    Raises:
        ValueError: `groups` is not 1 or `base_width` is not 64.
        NotImplementedError: `dilation` above 1.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015.
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
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def _forward_fused(self, x: Tensor) -> Tensor:
        children = self.__dict__["_modules"]
        convs = [children[name] for name in self.fused_convs]
        norms = [children[name] for name in self.fused_norms]
        y = residual_block(x, convs, norms, self.downsample, self.memory)
        if y is not None:
            return y
        z = _stages.conv(x, convs[0])
        z = _stages.norm_act_conv(z, norms[0], convs[1])
        return _stages.end_of_block(z, norms[1], x, self.downsample, children["relu"])

    def _forward_stock(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        result: Tensor = self.relu(out)
        return result


class Bottleneck(FusedBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, ResNet v1.5: the stride sits in the 3x3.

    `relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`. Fused as `BasicBlock` is.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: a quarter of the output's channels.
        stride: of the 3x3 convolution.
        downsample: shortcut branch; None is the identity.
        groups: of the 3x3 convolution (ResNeXt).
        base_width: the inner width is ``int(planes * base_width / 64) * groups`` (ResNeXt, wide ResNet).
        dilation: of the 3x3 convolution.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015; Xie et al., "Aggregated Residual
    Transformations for Deep Neural Networks", 2016; Zagoruyko and Komodakis, "Wide Residual Networks", 2016.
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
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _forward_fused(self, x: Tensor) -> Tensor:
        children = self.__dict__["_modules"]
        convs = [children[name] for name in self.fused_convs]
        norms = [children[name] for name in self.fused_norms]
        y = residual_block(x, convs, norms, self.downsample, self.memory)
        if y is not None:
            return y
        z = _stages.conv(x, convs[0])
        z = _stages.norm_act_conv(z, norms[0], convs[1])
        z = _stages.norm_act_conv(z, norms[1], convs[2])
        return _stages.end_of_block(z, norms[2], x, self.downsample, children["relu"])

    def _forward_stock(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        result: Tensor = self.relu(out)
        return result
