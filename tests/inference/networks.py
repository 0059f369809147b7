"""Small networks with what the steps of a plan are made of, and how near their numbers must come."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import testing
from fused_resnet.models.cifar import CifarResNet
from fused_resnet.nn import BasicBlock, Bottleneck

# Terms of the longest sum in these networks: nine taps of 64 channels.
_LONGEST_SUM = 576
# Winograd's algorithm rounds about three times as much as nine taps do (docs/numerics.md).
_ROUNDINGS = 4


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """The stem of a ResNet, a basic block, a bottleneck with a strided shortcut, mean and linear layer."""

    def __init__(self, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.stem = conv_bn(channels, width, 7, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.basic = BasicBlock(width, width)
        shortcut = nn.Sequential(nn.Conv2d(width, 4 * width, 1, 2, bias=False), nn.BatchNorm2d(4 * width))
        self.bottleneck = Bottleneck(width, width, 2, shortcut)
        self.head = nn.Linear(4 * width, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.basic(self.pool(F.relu(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: a product, which no step of ours has, between convolutions that do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = conv_bn(3, width)
        self.second = conv_bn(width, width)
        self.squeeze = nn.Conv2d(width, 4, 1)
        self.excite = nn.Conv2d(4, width, 1)
        self.third = conv_bn(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.second(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.third(F.relu(x + y * gate))


class Pyramid(nn.Module):
    """Named outputs, of which one is read further on, and a value that three steps read."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.left = conv_bn(width, width)
        self.right = conv_bn(width, width, 1)
        self.down = conv_bn(width, 2 * width, stride=2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        fine = F.relu(self.left(x) + self.right(x) + x)
        coarse = F.silu(self.down(fine))
        return {"coarse": coarse, "fine": fine, "mean": coarse.mean((2, 3))}


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "cifar, shortcut A": lambda: CifarResNet(1),
    "cifar, shortcut B": lambda: CifarResNet(1, shortcut="B"),
    "gated": Gated,
    "pyramid": Pyramid,
}


def network(name: str) -> nn.Module:
    return randomised(NETWORKS[name]())


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return testing.draw(shape, dtype, generator=torch.Generator().manual_seed(seed), channels_last=True)


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of any output."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def same(got: Any, expected: Any) -> bool:
    """Bit by bit, NaN as NaN."""
    pairs = zip(flat(got), flat(expected), strict=True)
    return all(
        torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4)) and torch.equal(a.isnan(), b.isnan()) for a, b in pairs
    )


def error(got: Tensor, exact: Tensor) -> float:
    """Largest difference, as a part of the largest number; nothing but zeros is exact or wrong."""
    assert got.shape == exact.shape
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def assert_near(got: Any, exact: Any, own: Any, dtype: torch.dtype) -> None:
    """As near to `exact`, in float64, as PyTorch's operators in `dtype` came with `own`, up to some roundings."""
    for ours, reference, theirs in zip(flat(got), flat(exact), flat(own), strict=True):
        allowed = _ROUNDINGS * error(theirs, reference) + testing.unit_roundoff(dtype)
        allowed += testing.accumulation_tolerance(dtype, _LONGEST_SUM)
        assert error(ours, reference) <= allowed
