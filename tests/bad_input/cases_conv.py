"""Bad geometry and operands of the convolutions, alone and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_resnet as fr
from tests.bad_input.registry import BadCase, Trial, add

C, OUT = 6, 4
# For each function: the names of its weight and bias, and the operator its messages speak of.
FUNCTIONS = {
    "conv2d": ("weight", "bias", "conv2d", ("weight", "bias")),
    "conv_bn_act": ("conv_weight", "conv_bias", "conv", ("weight", "bias")),
    "batch_norm_act_conv": ("conv_weight", "conv_bias", "batch_norm_act_conv", ("conv_weight", "conv_bias")),
}


def _operands(function: str) -> dict[str, Any]:
    weight, bias, _, _ = FUNCTIONS[function]
    channels = C if function == "batch_norm_act_conv" else OUT
    found: dict[str, Any] = {"x": torch.randn(2, C, 5, 7), weight: torch.randn(OUT, C, 3, 3), bias: torch.randn(OUT)}
    if function != "conv2d":
        found["running_mean"], found["running_var"] = torch.randn(channels), torch.rand(channels) + 0.5
        found["training"] = True
    if function == "batch_norm_act_conv":
        found["weight"], found["bias"] = torch.rand(C), torch.randn(C)
    return found


def _bad(
    label: str,
    function: str,
    words: tuple[str, ...],
    raises: tuple[str, ...] = ("RuntimeError",),
    **changes: Callable[[], Any],
) -> None:
    def build() -> Trial:
        arguments = _operands(function)
        arguments.update({name: make() for name, make in changes.items()})
        state = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        return Trial(lambda: getattr(fr.ops, function)(**arguments), state)

    add(BadCase(f"{function}, geometry: {label}", build, raises, words))


def _value(value: Any) -> Callable[[], Any]:
    return lambda: value


for _function, (_weight, _bias, _op, (_spoken_weight, _spoken_bias)) in FUNCTIONS.items():

    def _says(*words: str, op: str = _op) -> tuple[str, ...]:
        return (op, "expected", "got", *words)

    for _name, _values in {
        "stride": (0, -1, (1, 0), (-2, 1), 2**40),
        "dilation": (0, -1, (1, 0), 2**40),
        "padding": (-1, (0, -3), 2**31, 2**62),
        "groups": (0, -1, 4, 5, 7, 2**40),
    }.items():
        for _v in _values:
            _bad(f"{_name} {_v}", _function, _says(_name), **{_name: _value(_v)})
    for _name in ("stride", "padding", "dilation"):
        for _v in ((1, 1, 1), (1,), 1.5, "same", None):
            _bad(f"{_name} {_v!r}", _function, (), ("TypeError", "RuntimeError", "ValueError"), **{_name: _value(_v)})
    _bad("groups 1.5", _function, (), ("TypeError",), groups=_value(1.5))
    # the kernel and what it meets
    _bad("kernel larger than x", _function, _says(_spoken_weight), **{_weight: lambda: torch.randn(OUT, C, 9, 3)})
    _bad(
        "dilated kernel larger than the padded x",
        _function,
        _says(_spoken_weight),
        dilation=_value(4),
        padding=_value(1),
    )
    _bad("kernel of extent 0", _function, _says(_spoken_weight), **{_weight: lambda: torch.randn(OUT, C, 0, 3)})
    _bad(
        "weight of other input channels",
        _function,
        _says(_spoken_weight),
        **{_weight: lambda: torch.randn(OUT, C + 1, 3, 3)},
    )
    _bad("weight of rank 3", _function, _says(_spoken_weight), **{_weight: lambda: torch.randn(OUT, C, 3)})
    _bad(
        "weight of another dtype",
        _function,
        _says(_spoken_weight),
        **{_weight: lambda: torch.randn(OUT, C, 3, 3).double()},
    )
    _bad(
        "weight of int64",
        _function,
        _says(_spoken_weight),
        **{_weight: lambda: torch.ones(OUT, C, 3, 3, dtype=torch.int64)},
    )
    _bad(
        "weight on another device",
        _function,
        _says(_spoken_weight),
        **{_weight: lambda: torch.empty(OUT, C, 3, 3, device="meta")},
    )
    _bad("weight is None", _function, (), ("TypeError", "RuntimeError"), **{_weight: _value(None)})
    _bad("bias short", _function, _says(_spoken_bias), **{_bias: lambda: torch.randn(OUT - 1)})
    _bad("bias of rank 2", _function, _says(_spoken_bias), **{_bias: lambda: torch.randn(OUT, 1)})
    _bad("bias of another dtype", _function, _says(_spoken_bias), **{_bias: lambda: torch.randn(OUT).double()})
    _bad("x of rank 3", _function, _says("x"), x=lambda: torch.randn(C, 5, 7))
    _bad("x of int64", _function, _says("x"), x=lambda: torch.ones(2, C, 5, 7, dtype=torch.int64))
    _bad("x of other channels", _function, ("expected", "got"), x=lambda: torch.randn(2, C + 1, 5, 7))

_bad(
    "residual of another shape",
    "conv_bn_act",
    ("expected", "residual", "got"),
    residual=lambda: torch.randn(2, OUT, 1, 1),
)
_bad("act 'gelu'", "conv_bn_act", ("conv_bn_act", "expected", "act", "got"), ("ValueError",), act=_value("gelu"))
_bad("eps 0", "conv_bn_act", ("expected", "eps", "got"), ("ValueError",), eps=_value(0.0))
_bad(
    "running_mean short", "conv_bn_act", ("expected", "running_mean", "got"), running_mean=lambda: torch.zeros(OUT - 1)
)


def _autocast(function: str, **changes: Any) -> Trial:
    arguments = _operands(function) | changes

    def call() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(fr.ops, function)(**arguments)

    return Trial(call, {name: value for name, value in arguments.items() if isinstance(value, Tensor)})


# x is wider than what the convolution computes in: the batch norm is through when the convolution has no memory.
add(
    BadCase(
        "batch_norm_act_conv, geometry: padding beyond memory, under autocast",
        lambda: _autocast("batch_norm_act_conv", padding=2_000_000),
        ("RuntimeError",),
        ("memory",),
    )
)
