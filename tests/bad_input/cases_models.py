"""Modules and models: constructors, inputs that do not fit, counters that must not move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.bad_input.registry import BadCase, State, Trial, add


def _bad(label: str, raises: str | tuple[str, ...], words: tuple[str, ...], call: Callable[[], object]) -> None:
    kinds = (raises,) if isinstance(raises, str) else raises
    add(BadCase(label, lambda: Trial(call), kinds, words, needs_extension=False))


def _on(
    label: str,
    raises: str | tuple[str, ...],
    words: tuple[str, ...],
    make: Callable[[], nn.Module],
    x: Callable[[], Tensor],
    needs_extension: bool = False,
    stock: bool = False,
) -> None:
    """Calls a module in training mode; nothing in it may change, unless torch's own layers run (``stock``), which count
    a batch before they look at it."""

    def build() -> Trial:
        module, value = make().train(), x()
        state: dict[str, State] = {} if stock else {"module": module}
        if value.device.type == "cpu":
            state["x"] = value
        return Trial(lambda: module(value), state)

    kinds = (raises,) if isinstance(raises, str) else raises
    add(BadCase(label, build, kinds, words, needs_extension=needs_extension))


# One value per channel: stock PyTorch raises too, but has counted the batch by then.
_SINGLE = ("ValueError", ("more than 1 value per channel", "got"))
for _name, _make in {
    "BatchNormAct2d": lambda: fr.nn.BatchNormAct2d(6),
    "ConvBNAct2d": lambda: fr.nn.ConvBNAct2d(6, 6, 1),
    "BasicBlock": lambda: fr.nn.BasicBlock(6, 6),
    "Bottleneck": lambda: fr.nn.Bottleneck(24, 6),
    "PreActBasicBlock": lambda: fr.nn.PreActBasicBlock(6, 6),
    "PreActBottleneck": lambda: fr.nn.PreActBottleneck(24, 6),
}.items():
    _channels = 24 if "Bottleneck" in _name else 6
    _x = lambda c=_channels: torch.randn(1, c, 1, 1)  # noqa: E731
    _on(f"{_name}: one value per channel in training", *_SINGLE, _make, _x, needs_extension=True)
    _wrong = lambda c=_channels: torch.randn(2, c + 1, 8, 8)  # noqa: E731
    _on(f"{_name}: input of other channels", ("RuntimeError", "ValueError"), ("got",), _make, _wrong, True)
    _ints = lambda c=_channels: torch.ones(2, c, 8, 8, dtype=torch.int64)  # noqa: E731
    _on(
        f"{_name}: integer input",
        ("RuntimeError", "ValueError", "NotImplementedError"),
        (),
        _make,
        _ints,
        stock="PreAct" in _name,
    )
    _flat = lambda c=_channels: torch.randn(2, c)  # noqa: E731
    _on(f"{_name}: input of rank 2", ("RuntimeError", "ValueError"), ("got",), _make, _flat)

_small = lambda: fr.models.cifar.resnet20()  # noqa: E731
_on("resnet20: input of other channels", "RuntimeError", ("3", "4"), _small, lambda: torch.randn(2, 4, 64, 64))
_on("resnet20: integer input", "RuntimeError", (), _small, lambda: torch.ones(2, 3, 64, 64, dtype=torch.uint8))
_on("resnet20: input of rank 5", "RuntimeError", (), _small, lambda: torch.randn(2, 3, 8, 8, 8))
_on("resnet20: no rows", ("RuntimeError", "ValueError"), (), _small, lambda: torch.randn(2, 3, 0, 64))
_on(
    "resnet20: another device",
    ("RuntimeError", "NotImplementedError"),
    (),
    _small,
    lambda: torch.empty(2, 3, 64, 64, device="meta"),
    stock=True,
)

# constructors: torchvision's errors
_bad("BasicBlock: groups=2", "ValueError", ("BasicBlock", "groups"), lambda: fr.nn.BasicBlock(8, 8, groups=2))
_bad(
    "BasicBlock: base_width=32",
    "ValueError",
    ("BasicBlock", "base_width"),
    lambda: fr.nn.BasicBlock(8, 8, base_width=32),
)
_bad("BasicBlock: dilation=2", "NotImplementedError", ("BasicBlock",), lambda: fr.nn.BasicBlock(8, 8, dilation=2))
_bad("resnet18: groups=2", "ValueError", ("BasicBlock",), lambda: fr.models.resnet18(groups=2))
_bad(
    "resnet50: two dilations",
    "ValueError",
    ("replace_stride_with_dilation", "3"),
    lambda: fr.models.resnet50(replace_stride_with_dilation=[False, True]),
)
_bad("resnet50: unknown argument", "TypeError", ("depth",), lambda: fr.models.resnet50(depth=50))
_bad("resnet50: positional weights", "TypeError", (), lambda: fr.models.resnet50("weights"))  # type: ignore[misc]
_bad("BatchNormAct2d: act", "ValueError", ("gelu",), lambda: fr.nn.BatchNormAct2d(8, act="gelu"))
_bad("ConvBNAct2d: act", "ValueError", ("gelu",), lambda: fr.nn.ConvBNAct2d(8, 8, 3, act="gelu"))
_bad("ConvBNAct2d: groups", "ValueError", ("groups",), lambda: fr.nn.ConvBNAct2d(8, 8, 3, groups=3))
_bad("cifar: shortcut", "ValueError", ("shortcut", "C"), lambda: fr.models.cifar.resnet20(shortcut="C"))
_bad("convert: not a module", ("TypeError", "ValueError"), (), lambda: fr.convert("resnet18"))  # type: ignore[arg-type]
