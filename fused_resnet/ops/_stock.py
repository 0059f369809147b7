"""The operators in stock PyTorch: used without the extension, and as the oracle of the tests.

Same arguments and results as the public functions of this package; also the same refusals where stock PyTorch would
broadcast silently, or crash.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops._activation import apply_activation, check_activation

Pair = tuple[int, int]


def _check_norm(
    op: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float, prefix: str
) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"{op}: expected {prefix or 'x'} to be floating point, got {x.dtype}")
    if x.dim() < 2:
        raise RuntimeError(f"{op}: expected {prefix or 'x'} of shape (N, C, ...), got {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"{op}: expected {prefix}eps > 0, got {eps}")
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(f"{op}: expected {prefix}running_mean and {prefix}running_var when not training, got None")
    for name, stat in ((f"{prefix}running_mean", running_mean), (f"{prefix}running_var", running_var)):
        if stat is not None and stat.shape != (x.shape[1],):
            raise RuntimeError(f"{op}: expected {name} of shape ({x.shape[1]},), got {tuple(stat.shape)}")


def _check_same_shape(op: str, x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape:
        raise RuntimeError(f"{op}: expected residual of shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not residual.is_floating_point():
        raise RuntimeError(f"{op}: expected residual to be floating point, got {residual.dtype}")


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
    """`act(batch_norm(x) + residual)`."""
    op = "batch_norm_act"
    check_activation(op, act, act_weight)
    _check_norm(op, x, running_mean, running_var, training, eps, "")
    if residual is not None:
        _check_same_shape(op, x, residual)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return apply_activation(y if residual is None else y + residual, act, negative_slope, act_weight)


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
    """`act(batch_norm(x) + batch_norm'(residual))`."""
    op = "dual_batch_norm_act"
    residual_training = training if residual_training is None else residual_training
    residual_momentum = momentum if residual_momentum is None else residual_momentum
    residual_eps = eps if residual_eps is None else residual_eps
    check_activation(op, act, act_weight)
    _check_same_shape(op, x, residual)
    _check_norm(op, x, running_mean, running_var, training, eps, "")
    _check_norm(op, residual, residual_running_mean, residual_running_var, residual_training, residual_eps, "residual_")
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    r = F.batch_norm(
        residual,
        residual_running_mean,
        residual_running_var,
        residual_weight,
        residual_bias,
        residual_training,
        residual_momentum,
        residual_eps,
    )
    return apply_activation(y + r, act, negative_slope, act_weight)


def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`max_pool2d(act(batch_norm(x)), 3, stride=2, padding=1)`."""
    op = "batch_norm_act_max_pool"
    check_activation(op, act, act_weight)
    if x.dim() != 4:
        raise RuntimeError(f"{op}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    _check_norm(op, x, running_mean, running_var, training, eps, "")
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.max_pool2d(apply_activation(y, act, negative_slope, act_weight), 3, stride=2, padding=1)


def add_act(
    x: Tensor,
    residual: Tensor,
    act: str = "relu",
    *,
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`act(x + residual)`."""
    op = "add_act"
    check_activation(op, act, act_weight)
    _check_same_shape(op, x, residual)
    return apply_activation(x + residual, act, negative_slope, act_weight)


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
    """`torch.nn.functional.conv2d` on batched input."""
    if x.dim() != 4:
        raise RuntimeError(f"conv2d: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


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
    """`conv2d(act(batch_norm(x)), conv_weight)`."""
    op = "batch_norm_act_conv"
    check_activation(op, act, act_weight)
    _check_norm(op, x, running_mean, running_var, training, eps, "")
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = apply_activation(y, act, negative_slope, act_weight)
    return conv2d(y, conv_weight, conv_bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
