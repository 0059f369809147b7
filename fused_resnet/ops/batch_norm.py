"""Batch normalisation fused with a residual and an activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_resnet.ops import _native, _stock
from fused_resnet.ops._activation import activation_code


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Batch normalisation, residual add and activation in one pass over memory.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`; mean and var per channel are those of `x` when
    `training`, else the running ones.

    Args:
        x: `(N, C, ...)`, 2 to 5 dimensions, float64, float32, bfloat16 or float16. NCHW and channels_last are both
            native; any other layout is copied once.
        running_mean, running_var: `(C,)`, or None, which only training allows.
        weight, bias: `(C,)` in `x`'s dtype, float32 or float64; None means ones and zeros.
        residual: shape of `x`. A half-precision `x` and a float32 `residual` (or the reverse) are computed in float32,
            as `x + residual` would be.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics. None is not accepted: a cumulative average needs the
            counter that only a module has.
        eps: greater than zero.
        act: "identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh" or "silu".
        negative_slope: of "leaky_relu".
        act_weight: `(C,)` or `(1,)`, the learned slope of "prelu"; required there and refused elsewhere.

    Returns:
        y: shape, dtype and layout of `x`.

    Mutates `running_mean` and `running_var` when training. Saves for backward `x`, the statistics and the parameters;
    with a residual also one bit per element (relu, leaky_relu) or the residual (prelu, sigmoid, tanh, silu).

    Gradients: for `x`, `weight`, `bias`, `residual` and `act_weight`; differentiable twice (the second time through
    stock PyTorch).

    Raises:
        ValueError: unknown `act`, `eps` not above zero, one value per channel in training.
        RuntimeError: shapes, dtypes or devices that do not fit. Nothing has been changed then.

    Numerics: statistics and arithmetic are float32 (float64 for float64), merged in a fixed order: results do not
    depend on the number of threads.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    if _native.C is None:
        _native.check_types(batch_norm_act, locals())
        return _stock.batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            residual=residual,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            negative_slope=negative_slope,
            act_weight=act_weight,
        )
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.batch_norm_act.default if torch.compiler.is_compiling() else _native.C.batch_norm_act
    )
    try:
        return op(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            act_weight,
            training,
            momentum,
            eps,
            activation_code("batch_norm_act", act),
            negative_slope,
        )
    except TypeError:
        _native.check_types(batch_norm_act, locals())
        raise


def dual_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_training: bool | None = None,
    residual_momentum: float | None = None,
    residual_eps: float | None = None,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Two batch normalisations, their sum and an activation in one pass: the end of a block with a downsample branch.

    `y = act(batch_norm(x) + batch_norm'(residual))`, each as in `batch_norm_act`.

    Args:
        x: `(N, C, ...)`, as in `batch_norm_act`.
        running_mean, running_var, weight, bias: `(C,)` or None, of `x`'s batch normalisation.
        residual: shape and dtype of `x`: the output of the branch's convolution.
        residual_running_mean, residual_running_var, residual_weight, residual_bias: `(C,)` or None, of the second.
        training, momentum, eps: of the first.
        residual_training, residual_momentum, residual_eps: of the second; None means the same as the first.
        act, negative_slope, act_weight: as in `batch_norm_act`.

    Returns:
        y: shape, dtype and layout of `x`.

    Mutates the running statistics of whichever half is training. Saves for backward `x`, `residual`, both statistics
    and the parameters; for relu and leaky_relu one bit per element.

    Gradients: for `x`, `residual`, all weights and biases, and `act_weight`; differentiable twice.

    Raises:
        ValueError, RuntimeError: as `batch_norm_act`. Nothing has been changed then.

    Numerics: as `batch_norm_act`.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, projection shortcuts.
    """
    residual_training = training if residual_training is None else residual_training
    residual_momentum = momentum if residual_momentum is None else residual_momentum
    residual_eps = eps if residual_eps is None else residual_eps
    if _native.C is None:
        _native.check_types(dual_batch_norm_act, locals())
        return _stock.dual_batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            residual_running_mean,
            residual_running_var,
            residual_weight,
            residual_bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual_training=residual_training,
            residual_momentum=residual_momentum,
            residual_eps=residual_eps,
            act=act,
            negative_slope=negative_slope,
            act_weight=act_weight,
        )
    compiling = torch.compiler.is_compiling()
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.batch_norm_act_dual.default if compiling else _native.C.batch_norm_act_dual
    )
    try:
        return op(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            residual_running_mean,
            residual_running_var,
            residual_weight,
            residual_bias,
            act_weight,
            training,
            momentum,
            eps,
            residual_training,
            residual_momentum,
            residual_eps,
            activation_code("dual_batch_norm_act", act),
            negative_slope,
        )
    except TypeError:
        _native.check_types(dual_batch_norm_act, locals())
        raise


def add_act(
    x: Tensor,
    residual: Tensor,
    act: str = "relu",
    *,
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Add and activate in one pass: `y = act(x + residual)`.

    Args:
        x: `(N, C, ...)`, 2 to 5 dimensions, float64, float32, bfloat16 or float16.
        residual: shape of `x`; dtypes mix as in `batch_norm_act`. No broadcasting.
        act, negative_slope, act_weight: as in `batch_norm_act`.

    Returns:
        y: shape, dtype and layout of `x`.

    Mutates nothing. Saves for backward one bit per element (relu, leaky_relu), nothing (identity), or `x` and
    `residual`.

    Gradients: for `x`, `residual` and `act_weight`; differentiable twice.

    Raises:
        ValueError: unknown `act`.
        RuntimeError: shapes, dtypes or devices that do not fit.

    Numerics: float32 arithmetic (float64 for float64), one rounding; the sign of zero is kept.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """
    if _native.C is None:
        _native.check_types(add_act, locals())
        return _stock.add_act(x, residual, act, negative_slope=negative_slope, act_weight=act_weight)
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.add_act.default if torch.compiler.is_compiling() else _native.C.add_act
    )
    try:
        return op(x, residual, act_weight, activation_code("add_act", act), negative_slope)
    except TypeError:
        _native.check_types(add_act, locals())
        raise
