"""Shapes, dtypes and layouts of the device operators' results, for torch.compile, export and fake tensors.

They repeat what `csrc/bindings` decides (`plan.h` there); `torch.library.opcheck` in the tests compares the two.
"""

# ruff: noqa: ARG001  (arguments are the operator's, whether or not the shapes depend on them)

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_MASKED = (1, 2)  # relu, leaky_relu: their derivative is one bit


class _Plan(NamedTuple):
    memory_format: torch.memory_format  # of every output that has x's shape
    rows: torch.SymInt | int  # of the axis that is contiguous in memory
    row: torch.SymInt | int


def register(c: ModuleType) -> None:
    """Register every fake implementation; `c` is the extension."""
    fake = torch.library.register_fake
    fake("fused_resnet::batch_norm_act_forward", _batch_norm_act_forward)
    fake("fused_resnet::batch_norm_act_apply", _batch_norm_act_apply)
    fake("fused_resnet::batch_norm_act_add", _batch_norm_act_add)
    fake("fused_resnet::conv2d_norm_forward", _conv2d_norm_forward)
    fake("fused_resnet::conv2d_norm_backward", _conv2d_norm_backward)
    fake("fused_resnet::conv2d_norm_backward_data", _conv2d_norm_backward_data)
    fake("fused_resnet::conv2d_norm_backward_weight", _conv2d_norm_backward_weight)
    fake("fused_resnet::batch_norm_statistics", _batch_norm_statistics)
    fake("fused_resnet::batch_norm_input_gradient", _batch_norm_input_gradient)
    fake("fused_resnet::batch_norm_act_backward", _batch_norm_act_backward)
    fake("fused_resnet::batch_norm_update_", _batch_norm_update_)
    fake("fused_resnet::batch_norm_act_max_pool_forward", _max_pool_forward)
    fake("fused_resnet::batch_norm_act_max_pool_backward", _max_pool_backward)
    emulated = {dtype for dtype in (torch.bfloat16, torch.float16) if not c.native_convolution(dtype)}

    def widened(x: Tensor) -> bool:
        return x.dtype in emulated and x.device.type != "cuda"

    def conv2d_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        dtype = x.dtype
        if widened(x):
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
        return y.to(dtype)

    def conv2d_backward(
        grad_output: Tensor,
        x: Tensor,
        weight: Tensor,
        has_bias: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = x.dtype
        if widened(x):
            grad_output, x, weight = grad_output.float(), x.float(), weight.float()
        grads = torch.ops.aten.convolution_backward(
            grad_output,
            x,
            weight,
            [weight.shape[0]] if has_bias else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            output_mask,
        )
        grad_x, grad_weight, grad_bias = (x.new_empty(0) if grad is None else grad for grad in grads)
        return grad_x.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)

    fake("fused_resnet::conv2d_forward", conv2d_forward)
    fake("fused_resnet::conv2d_backward", conv2d_backward)


def _plan(x: Tensor) -> _Plan:
    n, c = x.shape[0], x.shape[1]
    s = 1
    for extent in x.shape[2:]:
        s = s * extent
    memory_format = torch._prims_common.suggest_memory_format(x)
    if memory_format is not torch.contiguous_format or x.dim() == 2:
        return _Plan(memory_format, n * s, c)
    return _Plan(memory_format, n * c, s)


def _stat(x: Tensor, size: torch.SymInt | int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _check_channels(op: str, x: Tensor, **operands: Tensor | None) -> None:
    torch._check(x.dim() >= 2, lambda: f"{op}: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    for name, operand in operands.items():
        if operand is not None and (operand.dim() != 1 or operand.shape[0] != x.shape[1]):
            raise RuntimeError(f"{op}: expected {name} of shape ({x.shape[1]},), got {tuple(operand.shape)}")


def _batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    residual_norm: bool,
    residual_training: bool,
    eps: float,
    residual_eps: float,
    act: int,
    negative_slope: float,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    _check_channels("batch_norm_act", x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    plan = _plan(x)
    c = x.shape[1]
    c_residual = c if residual_norm else 0
    masked = save_mask and act in _MASKED and residual is not None
    mask_bytes = plan.rows * ((plan.row + 7) // 8) if masked else 0
    return (
        torch.empty_like(x, memory_format=plan.memory_format),
        _stat(x, c),
        _stat(x, c),
        _stat(x, c if training else 0),
        _stat(x, c_residual),
        _stat(x, c_residual),
        _stat(x, c_residual if residual_training else 0),
        x.new_empty(mask_bytes, dtype=torch.uint8),
    )


def _batch_norm_act_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    act: int,
    negative_slope: float,
) -> Tensor:
    _check_channels("batch_norm_act_apply", x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    return torch.empty_like(x, memory_format=_plan(x).memory_format)


def _batch_norm_act_add(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor | None,
    residual_rstd: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    act: int,
    negative_slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    _check_channels("batch_norm_act_add", x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    plan = _plan(x)
    mask_bytes = plan.rows * ((plan.row + 7) // 8) if save_mask and act in _MASKED else 0
    return torch.empty_like(x, memory_format=plan.memory_format), x.new_empty(mask_bytes, dtype=torch.uint8)


def _conv2d_norm_forward(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    conv_bias: Tensor | None = None,
    skip: Tensor | None = None,
    statistics: bool = True,
) -> tuple[Tensor, ...]:
    _check_channels("conv2d_norm_forward", x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    extents = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (conv_weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    c = conv_weight.shape[0]
    z = torch.empty([x.shape[0], c, *extents], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes = (c, c, c if training else 0) if statistics else (0, 0, 0)
    return z, *(_stat(x, size) for size in sizes)


def _conv2d_norm_backward_data(
    grad_output: Tensor,
    mask: Tensor | None,
    z: Tensor | None,
    z_mean: Tensor | None,
    z_rstd: Tensor | None,
    z_weight: Tensor | None,
    grad_z_weight: Tensor | None,
    grad_z_bias: Tensor | None,
    training: bool,
    conv_weight: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    skip: Tensor | None,
    skip_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _data_gradient(x, mean)


def _conv2d_norm_backward_weight(
    grad_output: Tensor,
    mask: Tensor | None,
    z: Tensor | None,
    z_mean: Tensor | None,
    z_rstd: Tensor | None,
    z_weight: Tensor | None,
    grad_z_weight: Tensor | None,
    grad_z_bias: Tensor | None,
    training: bool,
    conv_weight: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    has_conv_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    return _weight_gradient(x, conv_weight, has_conv_bias)


def _conv2d_norm_backward(
    grad_output: Tensor,
    mask: Tensor | None,
    z: Tensor | None,
    z_mean: Tensor | None,
    z_rstd: Tensor | None,
    z_weight: Tensor | None,
    grad_z_weight: Tensor | None,
    grad_z_bias: Tensor | None,
    training: bool,
    conv_weight: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: int,
    negative_slope: float,
    skip: Tensor | None,
    skip_mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    has_conv_bias: bool = False,
) -> tuple[Tensor, ...]:
    return *_data_gradient(x, mean), *_weight_gradient(x, conv_weight, has_conv_bias)


def _data_gradient(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    c = 0 if mean is None else x.shape[1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return grad_x, _stat(x, c), _stat(x, c)


def _weight_gradient(x: Tensor, conv_weight: Tensor, has_conv_bias: bool) -> tuple[Tensor, Tensor]:
    memory_format = torch._prims_common.suggest_memory_format(conv_weight)
    grad_bias = _stat(x, conv_weight.shape[0] if has_conv_bias else 0)
    return torch.empty_like(conv_weight, memory_format=memory_format), grad_bias


def _batch_norm_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_channels("batch_norm_statistics", x, running_mean=running_mean, running_var=running_var)
    c = x.shape[1]
    return _stat(x, c), _stat(x, c), _stat(x, c if training else 0)


def _batch_norm_input_gradient(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    training: bool,
    skip: Tensor | None,
) -> Tensor:
    _check_channels("batch_norm_input_gradient", x, mean=mean, rstd=rstd, weight=weight)
    return torch.empty_like(x, memory_format=_plan(x).memory_format)


def _batch_norm_act_backward(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_mean: Tensor | None,
    residual_rstd: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    act_weight: Tensor | None,
    mask: Tensor | None,
    training: bool,
    residual_training: bool,
    act: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    plan = _plan(x)

    def like_x(wanted: bool) -> Tensor:
        return torch.empty_like(x, memory_format=plan.memory_format) if wanted else x.new_empty(0)

    c = x.shape[1]
    return (
        like_x(output_mask[0]),
        _stat(x, c if output_mask[1] else 0),
        _stat(x, c if output_mask[2] else 0),
        like_x(output_mask[3]),
        _stat(x, c if output_mask[4] else 0),
        _stat(x, c if output_mask[5] else 0),
        _stat(x, c if output_mask[6] else 0),
    )


def _batch_norm_update_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    return None


def _pooled(x: Tensor) -> list[torch.SymInt | int]:
    n, c, h, w = x.shape
    return [n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1]


def _max_pool_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    eps: float,
    act: int,
    negative_slope: float,
    save_argmax: bool,
) -> tuple[Tensor, ...]:
    op = "batch_norm_act_max_pool"
    torch._check(x.dim() == 4, lambda: f"{op}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    _check_channels(op, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    memory_format = _plan(x).memory_format
    c = x.shape[1]
    y = torch.empty(_pooled(x), dtype=x.dtype, device=x.device, memory_format=memory_format)
    argmax = torch.empty_like(y, dtype=torch.uint8) if save_argmax else x.new_empty(0, dtype=torch.uint8)
    return y, _stat(x, c), _stat(x, c), _stat(x, c if training else 0), argmax


def _max_pool_backward(
    grad_output: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    act: int,
    negative_slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    c = x.shape[1]
    grad_x = torch.empty_like(x, memory_format=_plan(x).memory_format) if output_mask[0] else x.new_empty(0)
    return (
        grad_x,
        _stat(x, c if output_mask[1] else 0),
        _stat(x, c if output_mask[2] else 0),
        _stat(x, c if output_mask[3] else 0),
    )
