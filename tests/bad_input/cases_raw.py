"""The registered operators called directly, with damaged arguments that autograd would never hand them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.bad_input.registry import BadCase, Trial, add

C = 6
IMAGE = (2, C, 8, 10)
Arguments = dict[str, Any]


def _norm(**more: Any) -> Arguments:
    x = torch.randn(IMAGE)
    vector = torch.rand(C) + 0.5
    return {"x": x, "weight": vector.clone(), "bias": vector.clone(), "act_weight": None, **more}


def _forward() -> Arguments:
    names = ("residual", "residual_weight", "residual_bias", "residual_running_mean", "residual_running_var")
    return _norm(
        running_mean=torch.zeros(C),
        running_var=torch.ones(C),
        **dict.fromkeys(names),
        training=False,
        residual_norm=False,
        residual_training=False,
        eps=1e-5,
        residual_eps=1e-5,
        act=1,
        negative_slope=0.01,
        save_mask=True,
    )


def _backward() -> Arguments:
    names = ("residual", "residual_mean", "residual_rstd", "residual_weight", "residual_bias")
    return _norm(
        grad_output=torch.randn(IMAGE),
        mean=torch.zeros(C),
        rstd=torch.ones(C),
        **dict.fromkeys(names),
        mask=None,
        training=True,
        residual_training=False,
        act=1,
        negative_slope=0.01,
        output_mask=[True, True, True, False, False, False, False],
    )


def _pool_backward() -> Arguments:
    return _norm(
        grad_output=torch.randn(2, C, 4, 5),
        argmax=torch.full((2, C, 4, 5), 4, dtype=torch.uint8),
        mean=torch.zeros(C),
        rstd=torch.ones(C),
        training=True,
        act=1,
        negative_slope=0.01,
        output_mask=[True, True, True, False],
    )


def _pool_forward() -> Arguments:
    return _norm(
        running_mean=torch.zeros(C),
        running_var=torch.ones(C),
        training=False,
        eps=1e-5,
        act=1,
        negative_slope=0.01,
        save_argmax=True,
    )


def _update() -> Arguments:
    return {
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "mean": torch.randn(C),
        "var": torch.rand(C),
        "count": 100,
        "momentum": 0.1,
    }


def _apply() -> Arguments:
    return _norm(mean=torch.zeros(C), rstd=torch.ones(C), act=1, negative_slope=0.01)


def _conv_backward() -> Arguments:
    return {
        "grad_output": torch.randn(2, 4, 8, 10),
        "x": torch.randn(IMAGE),
        "weight": torch.randn(4, C, 3, 3),
        "has_bias": True,
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "output_mask": [True, True, True],
    }


GOOD: dict[str, Callable[[], Arguments]] = {
    "batch_norm_act_forward": _forward,
    "batch_norm_act_apply": _apply,
    "batch_norm_act_backward": _backward,
    "batch_norm_update_": _update,
    "batch_norm_act_max_pool_forward": _pool_forward,
    "batch_norm_act_max_pool_backward": _pool_backward,
    "conv2d_backward": _conv_backward,
}


def _bad(
    op: str,
    label: str,
    words: tuple[str, ...] = (),
    raises: tuple[str, ...] = ("RuntimeError", "ValueError"),
    may_succeed: bool = False,
    key: str | None = None,
    **changes: Any,
) -> None:
    """With `key` the kernel of that dispatch key is called, whatever the tensors are."""

    def build() -> Trial:
        arguments = GOOD[op]()
        arguments.update({name: value() if callable(value) else value for name, value in changes.items()})
        state = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        overload = getattr(torch.ops.fused_resnet, op).default
        if key is None:
            return Trial(lambda: overload(**arguments), state)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        return Trial(lambda: overload.redispatch(keys, **arguments), state)

    says = ("expected", "got", *words) if words else ()
    add(BadCase(f"raw {op}: {label}", build, raises, says, may_succeed))


_forward_ops = ("batch_norm_act_forward", "batch_norm_act_max_pool_forward")
for _op in _forward_ops:
    _bad(_op, "eval without statistics", ("running_mean",), running_mean=None, running_var=None)
    _bad(_op, "eval with an empty variance", ("running_var",), running_var=lambda: torch.empty(0))
    _bad(
        _op, "training with short statistics", ("running_mean",), training=True, running_mean=lambda: torch.zeros(C - 1)
    )
    _bad(_op, "act 99", ("act",), act=99)
    _bad(_op, "act -1", ("act",), act=-1)
    _bad(_op, "eps 0", ("eps",), eps=0.0)
_bad("batch_norm_act_forward", "residual_norm without residual", ("residual",), residual_norm=True)
for _op in ("batch_norm_act_apply", "batch_norm_act_backward", "batch_norm_act_max_pool_backward"):
    for _name in ("mean", "rstd", "weight", "bias"):
        for _length in (0, C - 1, C + 1):
            _bad(_op, f"{_name} of length {_length}", (_name,), **{_name: lambda n=_length: torch.rand(n)})
    for _name in ("mean", "rstd"):
        _bad(_op, f"{_name} of float64", (_name,), **{_name: lambda: torch.rand(C).double()})
    _bad(_op, "act 99", ("act",), act=99)
    _bad(_op, "prelu without slope", ("act_weight",), act=3)
for _op in ("batch_norm_act_backward", "batch_norm_act_max_pool_backward", "conv2d_backward"):
    for _shape in ((1, 1, 1, 1), (2, C, 4), (0,), (2, C + 1, 8, 10), (1, C, 8, 10)):
        _bad(_op, f"grad_output of shape {_shape}", ("grad_output",), grad_output=lambda s=_shape: torch.randn(s))
    _wide = lambda op=_op: GOOD[op]()["grad_output"].double()  # noqa: E731
    _bad(_op, "grad_output of float64", ("grad_output",), grad_output=_wide)
_bad("batch_norm_act_backward", "mask too short", ("mask",), mask=lambda: torch.zeros(3, dtype=torch.uint8))
_bad("batch_norm_act_backward", "mask of float32", ("mask",), mask=lambda: torch.zeros(2 * C * 10))
_bad("batch_norm_act_backward", "residual of another shape", ("residual",), residual=lambda: torch.randn(2, C, 1, 1))
_bad("batch_norm_act_backward", "residual_mean alone", ("residual",), residual_mean=lambda: torch.zeros(C))
_bad(
    "batch_norm_act_backward",
    "gradient of a slope that is not there",
    ("act_weight",),
    output_mask=[True] * 3 + [False] * 3 + [True],
)
_bad(
    "batch_norm_act_backward",
    "gradients of a residual that is not there",
    may_succeed=True,
    output_mask=[True] * 6 + [False],
)
for _length in (0, C - 1, C + 1):
    for _name in ("running_mean", "running_var", "mean", "var"):
        _bad("batch_norm_update_", f"{_name} of length {_length}", (), **{_name: lambda n=_length: torch.rand(n)})
_bad("batch_norm_update_", "count 0", may_succeed=True, count=0)
_bad("batch_norm_update_", "count 1", may_succeed=True, count=1)
_bad("batch_norm_update_", "count -5", may_succeed=True, count=-5)
_bad("batch_norm_update_", "running_mean of int64", (), running_mean=lambda: torch.zeros(C, dtype=torch.int64))
_pool = "batch_norm_act_max_pool_backward"
_bad(_pool, "argmax of another shape", ("argmax",), argmax=lambda: torch.zeros(2, C, 3, 5, dtype=torch.uint8))
_bad(_pool, "argmax empty", ("argmax",), argmax=lambda: torch.zeros(0, dtype=torch.uint8))
_bad(_pool, "argmax of int64", ("argmax",), argmax=lambda: torch.zeros(2, C, 4, 5, dtype=torch.int64))
for _tap in (0, 9, 127, 255):  # 0 is outside the image for the first row
    _taps = lambda tap=_tap: torch.full((2, C, 4, 5), tap, dtype=torch.uint8)  # noqa: E731
    _bad(_pool, f"argmax all {_tap}", may_succeed=True, argmax=_taps)
# Devices that differ. The meta device stands for a second one; its own kernels only compute shapes.
for _op, _names in {
    "batch_norm_act_forward": ("weight", "running_var"),
    "batch_norm_act_apply": ("mean", "rstd"),
    "batch_norm_act_backward": ("grad_output", "mean", "bias"),
    "batch_norm_update_": ("running_mean", "var"),
    "batch_norm_act_max_pool_forward": ("bias", "running_mean"),
    "batch_norm_act_max_pool_backward": ("grad_output", "argmax", "rstd"),
    "conv2d_backward": ("grad_output", "weight"),
}.items():
    for _name in _names:
        _meta = lambda op=_op, name=_name: GOOD[op]()[name].to("meta")  # noqa: E731
        _bad(_op, f"{_name} on another device", (_op, _name, "device", "meta"), key="CPU", **{_name: _meta})
# Where CUDA is not built, whoever asks for its kernels is told how to get them; where it is, they look at the device.
for _op in GOOD:
    _bad(_op, "on CUDA", raises=("NotImplementedError",), may_succeed=True, key="CUDA")
