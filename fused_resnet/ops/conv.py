"""Convolutions and what stands before and behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_resnet.ops import _native, _stock
from fused_resnet.ops._activation import activation_code, check_activation
from fused_resnet.ops.batch_norm import batch_norm_act

Pair = tuple[int, int]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Two-dimensional convolution: ATen's, with pooled memory on the CPU.

    Args:
        x: `(N, C, H, W)`, any floating dtype, any layout.
        weight: `(O, C / groups, KH, KW)`, dtype of `x`.
        bias: `(O,)` or None.
        stride, padding, dilation: one integer or (rows, columns).
        groups: divides C and O.

    Returns:
        `(N, O, HO, WO)`, channels_last when `x` or `weight` is.

    Mutates nothing. Saves `x` and `weight` for backward.

    Gradients: for `x`, `weight` and `bias`; differentiable twice.

    Raises:
        RuntimeError: shapes, dtypes, devices or geometry that do not fit.

    Numerics: as ATen's; bfloat16 and float16 are convolved in float32, and rounded once, where the CPU has no native
    instructions for them (ATen would emulate them there, several times slower).

    Source: torch.nn.functional.conv2d.
    """
    if _native.C is None:
        _native.check_types(conv2d, locals())
        return _stock.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.conv2d.default if torch.compiler.is_compiling() else _native.C.conv2d
    )
    try:
        return op(x, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    except TypeError:
        _native.check_types(conv2d, locals())
        raise


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Convolution, then batch normalisation, residual add and activation: `act(batch_norm(conv2d(x)) + residual)`.

    Args:
        x: `(N, C, H, W)`; `conv_weight`, `conv_bias`, `stride`, `padding`, `dilation`, `groups` as in `conv2d`.
        running_mean, running_var, bn_weight, bn_bias: `(O,)` or None, as in `batch_norm_act`.
        residual: `(N, O, HO, WO)` or None.
        training, momentum, eps, act, negative_slope, act_weight: as in `batch_norm_act`.

    Returns:
        `(N, O, HO, WO)`.

    Mutates the running statistics when training. Saves what `conv2d` and `batch_norm_act` save.

    Gradients: for every floating tensor but the running statistics; differentiable twice.

    Raises:
        ValueError, RuntimeError: as `conv2d` and `batch_norm_act`. Nothing has been changed then.

    Numerics: as `conv2d` and `batch_norm_act`.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """
    check_activation("conv_bn_act", act, act_weight)  # before the convolution's time is spent
    z = conv2d(x, conv_weight, conv_bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return batch_norm_act(
        z,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        residual=residual,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        negative_slope=negative_slope,
        act_weight=act_weight,
    )


def batch_norm_act_conv(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Batch normalisation and activation, then the convolution that consumes them: `conv2d(act(batch_norm(x)))`.

    The same numbers as `batch_norm_act` followed by `conv2d`, with less memory: backward keeps `x` and computes
    `act(batch_norm(x))` again.

    Args:
        x: `(N, C, H, W)`; the batch normalisation's arguments as in `batch_norm_act` (no residual).
        conv_weight: `(O, C / groups, KH, KW)`; the convolution's arguments as in `conv2d`.

    Returns:
        `(N, O, HO, WO)`.

    Mutates the running statistics when training. Saves for backward `x`, its statistics and the parameters.

    Gradients: for `x`, `weight`, `bias`, `act_weight`, `conv_weight` and `conv_bias`; differentiable twice.

    Raises:
        ValueError, RuntimeError: as `conv2d` and `batch_norm_act`. Nothing has been changed then.

    Numerics: as `conv2d` and `batch_norm_act`.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, for the recomputation.
    """
    if _native.C is None:
        _native.check_types(batch_norm_act_conv, locals())
        return _stock.batch_norm_act_conv(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            conv_weight,
            conv_bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            negative_slope=negative_slope,
            act_weight=act_weight,
        )
    compiling = torch.compiler.is_compiling()
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.batch_norm_act_conv.default if compiling else _native.C.batch_norm_act_conv
    )
    try:
        return op(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            act_weight,
            training,
            momentum,
            eps,
            activation_code("batch_norm_act_conv", act),
            negative_slope,
            conv_weight,
            conv_bias,
            _pair(stride),
            _pair(padding),
            _pair(dilation),
            groups,
        )
    except TypeError:
        _native.check_types(batch_norm_act_conv, locals())
        raise
