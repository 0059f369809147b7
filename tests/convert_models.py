"""Modules of people's own for the tests of `convert`, with what it should make of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inplanes: int, planes: int) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)


class Base(nn.Module):
    """Two convolutions and batch norms for its subclasses to call."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(4, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if act is None else act
        self.shortcut: nn.Module | None = None
        self.alpha = 2.0
        self.tag = "none"


# Fusible: straight lines of children, torch functions and tensor methods.


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return torch.relu(torch.add(self.bn2(self.conv2(y)), x))


class Methods(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).sigmoid()
        y = self.bn2(self.conv2(y)).add_(x)
        return y.relu_()


class Activated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class PreActivated(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(x))
        y = self.conv1(y)
        return self.conv2(self.act(self.bn2(y))) + x


class TwoBranches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)) * self.alpha
        return self.act(y + x)


class Optional(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.tail(self.act(self.bn1(self.conv1(x))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        y += x
        return self.act(y) if self.alpha > 1 else y

    def tail(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.bn2(self.conv2(x))
        return x + x if twice else x


class ModeDependent(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.act(y) if self.training else torch.tanh(y)
        return F.dropout(self.bn2(self.conv2(y)), 0.5, self.training)


FUSIBLE = (Functional, Methods, Activated, PreActivated, TwoBranches, Scaled, Optional, ModeDependent)


# Not fusible: a trace would not be the whole truth.


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(self.bn1(self.conv1(x)))
        return x


class BranchOnInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return x if x.sum() > 0 else -x


class AsksForTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = self.act(self.bn1(self.conv1(x)))
        return x


class Stores(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.act(self.bn1(self.conv1(x)))
        return self.features


class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x))) * torch.rand(1).item()


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x))) + torch.rand(1)


class OptionalInput(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return y if mask is None else y * mask


class Inherits(Activated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bn1(x)


class Checks(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.act(self.bn1(self.conv1(x)))
        except ValueError:
            return x


SWITCH = True


class ReadsGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.act(y) if SWITCH else y


UNSAFE = {
    Loop: "for loop",
    BranchOnInput: "branches on its input",
    AsksForTensor: "calls isinstance",
    Stores: "stores to self.features",
    Random: "calls torch.rand",
    Noise: "calls torch.rand",
    OptionalInput: "optional input",
    Inherits: "super()",
    Checks: "try block",
    ReadsGlobal: "global SWITCH",
}


# Hazards: parts fuse, but not what somebody else could see.


class WritesToInput(Base):
    """The sum is written into the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        x += y
        return self.act(x)


class ChangedInBetween(Base):
    """The batch norm's input changes between the batch norm and the activation."""

    def forward(self, x: Tensor) -> Tensor:
        z = x * 2
        y = self.bn1(z)
        z.add_(1)
        return self.act(y) + z


class ResidualChanges(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = x * 2
        y = self.bn1(self.conv1(x)) + r
        r.mul_(0)
        return self.act(y) + r


class InputOfOneBranchChanges(Base):
    """Two batch norms and their sum, but the input of the first changes before the second."""

    def forward(self, x: Tensor) -> Tensor:
        z = x * 2
        y = self.bn1(z)
        z.add_(1)
        return self.act(self.bn2(self.conv2(z)) + y)


class ReadTwice(Base):
    """The normalised tensor and the activated one have other readers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        a = torch.relu(y)
        return self.bn2(self.conv2(a)) + a + y


class CalledTwice(Base):
    """One batch norm, two batches: the order of its updates matters."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        shortcut = self.bn1(x)
        return self.bn2(self.conv2(y)) + shortcut


class KeepsConvolution(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv1(x)
        return self.act(self.bn1(z)), z


HAZARDS = (ReadTwice, CalledTwice, KeepsConvolution, ResidualChanges)
# Autograd itself refuses their backward.
HAZARDS_WITHOUT_GRADIENT = (WritesToInput, ChangedInBetween, InputOfOneBranchChanges)
