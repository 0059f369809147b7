"""What is changed after `convert`: the plan sees it, or was never made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.nn import guard
from tests.convert_models import conv

pytestmark = pytest.mark.usefixtures("plans_run")


class Domains(nn.Module):
    """Several of everything, for its subclasses to choose from."""

    kept = staticmethod(F.relu)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other_conv = conv(4, 4), conv(4, 4)
        self.clean, self.noisy = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        nn.init.constant_(self.noisy.bias, 2.0)
        self.scale, self.other_scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 3.0))
        self.act: Any = F.relu
        self.alpha: Any = 1.0
        self.first = True


class TwoNames(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.named_conv = self.clean, self.conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.named_conv(x)))


class NestedNames(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.conv, self.clean, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Chosen(Domains):
    @property
    def bn(self) -> nn.Module:
        return self.clean if self.first else self.noisy

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class ChosenScale(Domains):
    @property
    def gain(self) -> Tensor:
        return self.scale if self.first else self.other_scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.clean(self.conv(x))) * self.gain


class TwoNamedScale(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.gain = self.scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.clean(self.conv(x))) * self.gain


class HeldFunction(Domains):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.clean(self.conv(x)))


class ClassFunction(Domains):
    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.clean(self.conv(x)))


class Scaled(Domains):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.clean(self.conv(x))) * self.alpha


CHANGES: dict[str, tuple[type[Domains], str, Callable[[Any], Any]]] = {
    "the norm of two names": (TwoNames, "bn", lambda m: m.noisy),
    "the convolution of two names": (TwoNames, "named_conv", lambda m: m.other_conv),
    "the first of two names": (NestedNames, "clean", lambda m: m.noisy),
    "the norm of a property": (Chosen, "first", lambda _: False),
    "the parameter of a property": (ChosenScale, "first", lambda _: False),
    "the parameter of two names": (TwoNamedScale, "gain", lambda m: m.other_scale),
    "a function": (HeldFunction, "act", lambda _: torch.tanh),
    "a function of the class": (ClassFunction, "kept", lambda _: torch.tanh),
    "a number by a number": (Scaled, "alpha", lambda _: 2.0),
    "a number by a parameter": (Scaled, "alpha", lambda _: nn.Parameter(torch.tensor(1.0))),
    "a number by a vector": (Scaled, "alpha", lambda _: nn.Parameter(torch.ones(4, 1, 1))),
    "a number by a tensor": (Scaled, "alpha", lambda _: torch.full((4, 1, 1), 2.0)),
}


def assert_equal_steps(model: nn.Module, stock: nn.Module) -> None:
    x = torch.randn(2, 4, 6, 6)
    for one in (model, stock):
        one.zero_grad()
        one(x).square().sum().backward()
    torch.testing.assert_close(model(x), stock(x))
    for (name, a), (_, b) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("case", CHANGES)
def test_change(case: str) -> None:
    cls, name, value = CHANGES[case]
    torch.manual_seed(0)
    stock = cls()
    model = fr.convert(stock)
    assert_equal_steps(model, stock)
    for one in (model, stock):
        if isinstance(getattr(one, name), float):
            delattr(one, name)  # where a parameter is to stand
        setattr(one, name, value(one))
    assert_equal_steps(model, stock)


@pytest.mark.parametrize("cls", [TwoNames, NestedNames, HeldFunction, Scaled])
def test_what_can_be_watched_is_fused(cls: type[Domains]) -> None:
    model = fr.convert(cls())
    assert isinstance(model, guard.FusedUnit)
    assert model.why_stock_children() is None


class Named(Domains):
    def __init__(self) -> None:
        super().__init__()
        self.exceptions = nn.Conv2d(4, 4, 1)

    def plan(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.exceptions(self.plan(torch.relu(self.clean(self.conv(x)))))


def test_names_that_the_fused_class_would_hide() -> None:
    stock = Named()
    model = fr.convert(stock)
    assert type(model) is Named
    assert_equal_steps(model, stock)


def test_a_class_that_gets_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(HeldFunction):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.clean(self.conv(x)))

    def negated(self: Mine, x: Tensor) -> Tensor:
        return -torch.relu(self.clean(self.conv(x)))

    stock = Mine().eval()
    model, x = fr.convert(stock), torch.randn(2, 4, 6, 6)
    monkeypatch.setattr(Mine, "forward", negated)
    for example in (None, x):
        assert fr.nn.explain(model, example)[0].why == "its class has another forward since it was converted"
    for one in (model, fr.convert(stock)):
        torch.testing.assert_close(one(x), stock(x))
