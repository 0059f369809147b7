"""Plain networks: the residual networks of He et al. 2015 without their shortcuts, for comparison.

ImageNet: `plain18` and `plain34`; the CIFAR twins are in `fused_resnet.models.cifar`. They have the parameters and
multiply-adds of the residual networks with parameter-free shortcuts, and train worse the deeper they are.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fused_resnet.models.resnet import ResNet
from fused_resnet.models.weights import Weights, load_weights
from fused_resnet.nn import BasicBlock, _stages
from fused_resnet.nn.blocks import FusedBlock, conv3x3


class PlainBlock(FusedBlock):
    """Two 3x3 convolutions: `relu(bn2(conv2(relu(bn1(conv1(x))))))`, `BasicBlock` without its shortcut.

    Args:
        inplanes: channels of x, of shape (N, inplanes, H, W).
        planes: channels of both convolutions and of the output.
        stride: of the first convolution.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``. Blocks with
            another one run stock.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 3.3.
    """

    fused_convs: ClassVar[tuple[str, ...]] = ("conv1", "conv2")
    fused_norms: ClassVar[tuple[str, ...]] = ("bn1", "bn2")
    fused_relus: ClassVar[tuple[str, ...]] = ("relu",)

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, norm_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.stride = stride

    def _forward_fused(self, x: Tensor) -> Tensor:
        z = _stages.norm_act_conv(_stages.conv(x, self.conv1), self.bn1, self.conv2)
        return _stages.norm_act(z, self.bn2)

    def _forward_stock(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        activated: Tensor = self.relu(self.bn2(self.conv2(out)))
        return activated


class PlainNet(ResNet):
    """An ImageNet network of plain blocks, with the children of `ResNet`.

    Args:
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        norm_layer: makes a normalisation layer from a number of channels; default ``nn.BatchNorm2d``.
    """

    def __init__(
        self, layers: list[int], num_classes: int = 1000, norm_layer: Callable[..., nn.Module] | None = None
    ) -> None:
        super().__init__(BasicBlock, layers, num_classes, norm_layer=norm_layer)

    def _make_layer(self, _: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        """Plain blocks in place of the basic blocks, whose width they share."""
        assert not dilate
        first = PlainBlock(self.inplanes, planes, stride, self._norm_layer)
        self.inplanes = planes
        return nn.Sequential(first, *(PlainBlock(planes, planes, 1, self._norm_layer) for _ in range(1, blocks)))


def _plain(layers: list[int], weights: Weights, progress: bool, kwargs: dict[str, Any]) -> PlainNet:
    model = PlainNet(layers, **kwargs)
    load_weights(model, weights, progress)
    return model


def plain18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PlainNet:
    """Plain-18: ResNet-18 without shortcuts."""
    return _plain([2, 2, 2, 2], weights, progress, kwargs)


def plain34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> PlainNet:
    """Plain-34: ResNet-34 without shortcuts."""
    return _plain([3, 4, 6, 3], weights, progress, kwargs)
