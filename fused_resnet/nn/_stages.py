"""The stages a fused unit is made of: each reads plain children and calls one operator of `fused_resnet.ops`.

The guard has looked at the children before; nothing here checks again.
"""

import torch
from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.nn._norm import count, operands
from fused_resnet.nn.guard import (
    pair,
    parameters_of,
    why_stock_conv,
    why_stock_downsample,
    why_stock_max_pool,
    why_stock_residual,
)


def conv(x: Tensor, module: nn.Module) -> Tensor:
    """`module(x)` for a plain Conv2d."""
    state = module.__dict__
    parameters = parameters_of(state)
    return ops.conv2d(
        x,
        parameters["weight"],
        parameters["bias"],
        stride=pair(state["stride"]),
        padding=pair(state["padding"]),
        dilation=pair(state["dilation"]),
        groups=state["groups"],
    )


def enter(x: Tensor) -> Tensor:
    """A model's input in the layout of the CPU's convolutions: copied once, and not at every layer."""
    if x.is_cpu and x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def conv_or_call(x: Tensor, module: nn.Module) -> Tensor:
    """`module(x)`: fused if it is a plain Conv2d, else called, with all its hooks."""
    if why_stock_conv(module) is None:
        return conv(x, module)
    result: Tensor = module(x)
    return result


def norm_act(
    z: Tensor,
    bn: nn.Module,
    residual: Tensor | None = None,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`act(bn(z) + residual)`."""
    mean, var, weight, bias, training, momentum, eps = operands(bn)
    y = ops.batch_norm_act(
        z,
        mean,
        var,
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
    count(bn)
    return y


def norm_act_conv(
    z: Tensor,
    bn: nn.Module,
    module: nn.Module,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`module(act(bn(z)))`; the activated tensor has no other consumer and is not kept."""
    mean, var, weight, bias, training, momentum, eps = operands(bn)
    state = module.__dict__
    parameters = parameters_of(state)
    y = ops.batch_norm_act_conv(
        z,
        mean,
        var,
        weight,
        bias,
        parameters["weight"],
        parameters["bias"],
        stride=pair(state["stride"]),
        padding=pair(state["padding"]),
        dilation=pair(state["dilation"]),
        groups=state["groups"],
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        negative_slope=negative_slope,
        act_weight=act_weight,
    )
    count(bn)
    return y


def norm_relu_pool_or_call(z: Tensor, bn: nn.Module, maxpool: nn.Module) -> Tensor:
    """`maxpool(relu(bn(z)))`: in one pass for the 3x3 max-pool of stride 2 and padding 1, else `maxpool` is called."""
    if why_stock_max_pool(maxpool) is not None:
        pooled: Tensor = maxpool(norm_act(z, bn))
        return pooled
    return norm_act_pool(z, bn)


def norm_act_pool(
    z: Tensor,
    bn: nn.Module,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`max_pool2d(act(bn(z)), 3, stride=2, padding=1)`."""
    mean, var, weight, bias, training, momentum, eps = operands(bn)
    y = ops.batch_norm_act_max_pool(
        z,
        mean,
        var,
        weight,
        bias,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        negative_slope=negative_slope,
        act_weight=act_weight,
    )
    count(bn)
    return y


def dual_norm_act(
    z: Tensor,
    bn: nn.Module,
    residual: Tensor,
    residual_bn: nn.Module,
    *,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """`act(bn(z) + residual_bn(residual))`."""
    if residual_bn is bn:  # the second use must see the statistics of the first
        first = norm_act(z, bn, act="identity")
        return norm_act(residual, bn, first, act=act, negative_slope=negative_slope, act_weight=act_weight)
    mean, var, weight, bias, training, momentum, eps = operands(bn)
    r_mean, r_var, r_weight, r_bias, r_training, r_momentum, r_eps = operands(residual_bn)
    y = ops.dual_batch_norm_act(
        z,
        mean,
        var,
        weight,
        bias,
        residual,
        r_mean,
        r_var,
        r_weight,
        r_bias,
        training=training,
        momentum=momentum,
        eps=eps,
        residual_training=r_training,
        residual_momentum=r_momentum,
        residual_eps=r_eps,
        act=act,
        negative_slope=negative_slope,
        act_weight=act_weight,
    )
    count(bn)
    count(residual_bn)
    return y


def end_of_block(z: Tensor, bn: nn.Module, x: Tensor, downsample: nn.Module | None, relu: nn.Module) -> Tensor:
    """`relu(bn(z) + downsample(x))`, in one pass where the shortcut allows it."""
    if downsample is None:
        residual = x
    elif why_stock_downsample(downsample) is None:
        shortcut_conv, shortcut_bn = downsample.__dict__["_modules"].values()
        residual = conv(x, shortcut_conv)
        if why_stock_residual(z, residual) is None:
            return dual_norm_act(z, bn, residual, shortcut_bn)
        residual = shortcut_bn(residual)
    else:
        residual = downsample(x)
    if why_stock_residual(z, residual) is None:
        return norm_act(z, bn, residual)
    y = bn(z)
    y += residual  # stock PyTorch promotes, broadcasts or complains here
    result: Tensor = relu(y)
    return result
