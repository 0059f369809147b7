"""Bad arguments of the four batch-norm operators and of add_act, through the public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_resnet as fr
from tests.bad_input.registry import BadCase, Trial, add

C = 6
IMAGE = (3, C, 5, 7)
NORM_OPS = ("batch_norm_act", "dual_batch_norm_act", "batch_norm_act_max_pool", "batch_norm_act_conv")


def operands(op: str) -> dict[str, Any]:
    """Good arguments of one operator by name."""
    found: dict[str, Any] = {
        "x": torch.randn(IMAGE),
        "running_mean": torch.randn(C),
        "running_var": torch.rand(C) + 0.5,
        "weight": torch.rand(C),
        "bias": torch.randn(C),
        "training": True,
    }
    if op == "add_act":
        return {"x": torch.randn(IMAGE), "residual": torch.randn(IMAGE)}
    if op == "batch_norm_act":
        found["residual"] = torch.randn(IMAGE)
    if op == "dual_batch_norm_act":
        found["residual"] = torch.randn(IMAGE)
        for name in ("running_mean", "running_var", "weight", "bias"):
            found[f"residual_{name}"] = found[name].clone()
    if op == "batch_norm_act_conv":
        found["conv_weight"] = torch.randn(4, C, 3, 3)
        found["conv_bias"] = torch.randn(4)
    return found


def bad(
    label: str,
    op: str,
    words: tuple[str, ...],
    raises: tuple[str, ...] = ("RuntimeError",),
    **changes: Callable[[], Any],
) -> None:
    """One case: the good arguments with some replaced by what ``changes`` make."""

    def build() -> Trial:
        arguments = operands(op)
        arguments.update({name: make() for name, make in changes.items()})
        state = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and not value.is_sparse}
        return Trial(lambda: getattr(fr.ops, op)(**arguments), state)

    add(BadCase(f"{op}: {label}", build, raises, words))


def _numpy_zeros() -> Any:
    import numpy as np  # not above: the tests of tests/gpu use this file where there may be none

    return np.zeros(IMAGE, dtype=np.float32)


def _says(op: str, *words: str) -> tuple[str, ...]:
    return (op, "expected", "got", *words)


def _half_running(dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.rand(C, dtype=dtype)


for _op in NORM_OPS:
    _prefixes = ("", "residual_") if _op == "dual_batch_norm_act" else ("",)
    # wrong rank
    bad("x of rank 1", _op, _says(_op, "x"), x=lambda: torch.randn(C))
    bad("x of rank 0", _op, _says(_op, "x"), x=lambda: torch.randn(()))
    if _op in ("batch_norm_act_max_pool", "batch_norm_act_conv"):
        bad("x of rank 3", _op, _says(_op, "x"), x=lambda: torch.randn(3, C, 5))
        bad("x of rank 5", _op, _says(_op, "x"), x=lambda: torch.randn(3, C, 5, 7, 2))
    # no tensor at all
    bad("x is None", _op, (), ("TypeError", "RuntimeError"), x=lambda: None)
    bad("x is a NumPy array", _op, (), ("TypeError",), x=_numpy_zeros)
    bad("weight is a list", _op, (), ("TypeError",), weight=lambda: [1.0] * C)
    # channel mismatch of every operand
    for _prefix in _prefixes:
        for _name in ("weight", "bias", "running_mean", "running_var"):
            for _label, _shape in (
                ("short", (C - 1,)),
                ("long", (C + 1,)),
                ("empty", (0,)),
                ("2d", (C, 1)),
                ("0d", ()),
            ):
                _make = lambda shape=_shape: torch.rand(shape)  # noqa: E731
                bad(f"{_prefix}{_name} {_label}", _op, _says(_op, _prefix + _name), **{_prefix + _name: _make})
    for _label, _shape in (("short", (C - 1,)), ("empty", (0,))):
        bad(
            f"act_weight {_label}",
            _op,
            _says(_op, "act_weight"),
            act=lambda: "prelu",
            act_weight=lambda shape=_shape: torch.rand(shape),
        )
    bad("x of another channel count", _op, _says(_op), x=lambda: torch.randn(3, C + 2, 5, 7))
    # dtypes without meaning
    for _dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        bad(f"x of {_dtype}", _op, _says(_op, "x"), x=lambda dtype=_dtype: torch.ones(IMAGE).to(dtype))
    for _name in ("weight", "bias", "running_mean", "running_var"):
        for _dtype in (torch.int64, torch.complex64):
            _ones = lambda dtype=_dtype: torch.ones(C).to(dtype)  # noqa: E731
            bad(f"{_name} of {_dtype}", _op, _says(_op, _name), **{_name: _ones})
    # devices and storages
    for _name in ("weight", "running_mean"):
        bad(f"{_name} on another device", _op, _says(_op, _name), **{_name: lambda: torch.ones(C, device="meta")})
    bad("x on another device", _op, (), x=lambda: torch.empty(IMAGE, device="meta"))
    bad("x sparse", _op, (), ("RuntimeError", "NotImplementedError"), x=lambda: torch.ones(IMAGE).to_sparse())
    # scalars
    for _prefix in _prefixes:
        for _value in (0.0, -1e-5, float("nan"), float("-inf"), float("inf")):
            _eps = lambda value=_value: value  # noqa: E731
            bad(f"{_prefix}eps {_value}", _op, _says(_op, _prefix + "eps"), ("ValueError",), **{_prefix + "eps": _eps})
    for _act in ("gelu", "ReLU", "", 1, None):
        bad(f"act {_act!r}", _op, ("expected", "act", "got"), ("ValueError",), act=lambda act=_act: act)
    bad("prelu without act_weight", _op, ("act_weight",), ("ValueError",), act=lambda: "prelu")
    bad("act_weight without prelu", _op, ("act_weight",), ("ValueError",), act_weight=lambda: torch.rand(C))
    bad("momentum None", _op, (), ("TypeError",), momentum=lambda: None)
    # statistics
    _no = lambda: None  # noqa: E731
    _eval = lambda: False  # noqa: E731
    bad("eval without statistics", _op, _says(_op, "running"), training=_eval, running_mean=_no, running_var=_no)
    bad("eval without a mean", _op, _says(_op, "running_mean"), training=_eval, running_mean=_no)
    bad("eval without a variance", _op, _says(_op, "running_var"), training=_eval, running_var=_no)
    bad(
        "eval with an empty variance",
        _op,
        _says(_op, "running_var"),
        training=_eval,
        running_var=lambda: torch.empty(0),
    )
    bad("training with one statistic", _op, _says(_op, "running_var"), running_var=_no)
    bad(
        "statistics of two dtypes",
        _op,
        _says(_op, "running_var"),
        x=lambda: torch.randn(IMAGE).bfloat16(),
        running_var=_half_running(torch.bfloat16),
        **({"residual": lambda: torch.randn(IMAGE).bfloat16()} if _op == "dual_batch_norm_act" else {}),
        **({"conv_weight": lambda: torch.randn(4, C, 3, 3).bfloat16(), "conv_bias": _no} if "conv" in _op else {}),
    )
    if _op == "batch_norm_act_conv":
        _single: dict[str, Callable[[], Any]] = {
            "x": lambda: torch.randn(1, C, 1, 1),
            "conv_weight": lambda: torch.randn(4, C, 1, 1),
        }
    else:
        _single = {"x": lambda: torch.randn(1, C, 1, 1)}
    if "residual" in operands(_op):
        _single["residual"] = lambda: torch.randn(1, C, 1, 1)
    bad(
        "one value per channel in training",
        _op,
        _says(_op, "more than 1 value per channel"),
        ("ValueError",),
        **_single,
    )

for _op in ("batch_norm_act", "dual_batch_norm_act", "add_act"):
    for _shape in (
        (1, C, 5, 7),
        (3, C, 1, 1),
        (3, 1, 5, 7),
        (C, 5, 7),
        (3, C, 7, 5),
        (3, C, 35),
        (3, C, 5, 7, 1),
        (),
        (0,),
    ):
        bad(f"residual {_shape}", _op, _says(_op, "residual"), residual=lambda shape=_shape: torch.randn(shape))
    for _dtype in (torch.int64, torch.bool, torch.complex64):
        _ones = lambda dtype=_dtype: torch.ones(IMAGE).to(dtype)  # noqa: E731
        bad(f"residual of {_dtype}", _op, _says(_op, "residual"), residual=_ones)
    bad("residual on another device", _op, _says(_op, "residual"), residual=lambda: torch.empty(IMAGE, device="meta"))
    bad("residual is a NumPy array", _op, (), ("TypeError",), residual=_numpy_zeros)

bad("x of int64", "add_act", _says("add_act", "x"), x=lambda: torch.ones(IMAGE, dtype=torch.int64))
bad("act 'gelu'", "add_act", ("add_act", "expected", "act", "got"), ("ValueError",), act=lambda: "gelu")
bad("prelu without act_weight", "add_act", ("add_act", "act_weight"), ("ValueError",), act=lambda: "prelu")
bad(
    "act_weight short",
    "add_act",
    _says("add_act", "act_weight"),
    act=lambda: "prelu",
    act_weight=lambda: torch.rand(C - 1),
)
