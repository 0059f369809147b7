"""The compiled extension as the operators see it: `C` is the module, or None for the stock path."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fused_resnet import _extension

C: Any = _extension.extension() if _extension.available() else None

if C is not None:
    from fused_resnet.ops import _fake

    _fake.register(C)


def check_types(function: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """Raise a TypeError that names the first argument whose type is not the one in `function`'s signature.

    The operators call it once pybind11 has refused a call (its message prints whole tensors, and does not say which
    argument it meant), and on the stock path.
    """
    for name, hint in typing.get_type_hints(function).items():
        if name in arguments and not _matches(arguments[name], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("torch.Tensor", "Tensor")
            got = repr(arguments[name]) if isinstance(arguments[name], int | float | str | tuple) else ""
            kind = type(arguments[name]).__name__
            raise TypeError(f"{function.__name__}: expected {name} to be {expected}, got {kind} {got}".rstrip())


def _matches(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_matches, value, parts))
    if typing.get_args(hint):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if hint is str:
        return True  # names of activations have their own error
    if hint is Tensor:
        return hasattr(value, "__torch_function__")  # tensors, and the proxies of torch.fx
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
