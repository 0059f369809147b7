"""Names of the operators and the arguments of stock steps, and back. Nothing is evaluated and nothing else is reached.

An operator is "aten.<name>.<overload>", or one of a few functions of numbers, such as "operator.mul", by which a
network computes with sizes. Among the arguments "torch.float32" is a dtype, and so for layouts and memory formats;
"torch.device" stands for whatever device the graph runs on, because a graph knows none.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "torch.device"

_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "abs")
_LOGIC = ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (*_ARITHMETIC, *_LOGIC)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
}
_SCALAR_NAMES = {function: name for name, function in _SCALAR_FUNCTIONS.items()}
_ATEN = re.compile(r"aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_CONSTANT_TYPES = (torch.dtype, torch.layout, torch.memory_format)


def name_of(target: Any) -> str | None:
    """The name of a function of a traced graph; None: a stock step cannot hold it."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if _ATEN.fullmatch(name) else None
    return _SCALAR_NAMES.get(target)


def resolve(name: str) -> Callable[..., Any]:
    """The function that `name_of` gave this name.

    Raises:
        ValueError: it is none of PyTorch's operators nor of the functions of numbers.
    """
    function = _SCALAR_FUNCTIONS.get(name)
    if function is not None:
        return function
    parts = _ATEN.fullmatch(name)
    packet = getattr(torch.ops.aten, parts[1], None) if parts else None
    found = getattr(packet, parts[2], None) if parts else None
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"stock step: expected an operator of PyTorch such as 'aten.cat.default', got {name!r}")
    return found


def encode_constant(value: Any) -> str:
    """A dtype, layout, memory format or device as a string."""
    return DEVICE if isinstance(value, torch.device) else str(value)


def is_constant(value: Any) -> bool:
    return isinstance(value, (*_CONSTANT_TYPES, torch.device))


def decode_constant(value: str, device: torch.device) -> Any:
    """What `encode_constant` encoded; any other string is itself."""
    if value == DEVICE:
        return device
    if not value.startswith("torch."):
        return value
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, _CONSTANT_TYPES):
        raise ValueError(f"stock step: expected a dtype, layout or memory format of torch, got {value!r}")
    return found
