"""What the code of a plan calls in place of the modules it replaces: each reads plain children and runs one operator.

The guard has looked at the children before; nothing here checks them again. What only the values at hand can tell (a
residual of another shape or dtype) is looked at here, and then the modules themselves are called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_resnet import ops
from fused_resnet.nn import _stages
from fused_resnet.nn.guard import parameters_of, why_stock_residual, why_stock_tensors
from fused_resnet.ops._activation import apply_activation

# The activation modules that have a kernel, by class: those of torch, and timm's twins of them by name.
_TORCH_ACTS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
}
_TIMM_ACTS = {"Swish": "silu", "Sigmoid": "sigmoid", "Tanh": "tanh", "PReLU": "prelu"}

Act = nn.Module | str


def act_name(cls: type) -> str | None:
    """The name of a module class's activation in `fused_resnet.ops`, None if it has none."""
    if cls in _TORCH_ACTS:
        return _TORCH_ACTS[cls]
    return _TIMM_ACTS.get(cls.__name__) if cls.__module__ == "timm.layers.activations" else None


def _act_arguments(act: Act) -> dict[str, Any]:
    name = act if isinstance(act, str) else act_name(type(act))
    if name == "leaky_relu":
        return {"act": name, "negative_slope": act.__dict__["negative_slope"]}
    if name == "prelu":
        return {"act": name, "act_weight": parameters_of(act.__dict__)["weight"]}
    return {"act": name}


def _stock_add_act(x: Tensor, residual: Tensor, act: Act, inplace: bool) -> Tensor:
    """By PyTorch's rules for broadcasting and promotion, which differ for an addition in place."""
    y = x.add_(residual) if inplace else x + residual
    if isinstance(act, str):
        return apply_activation(y, act, 0.01, None)
    result: Tensor = act(y)
    return result


convolution = _stages.conv  # (x, conv): conv(x)


def norm_act(z: Tensor, bn: nn.Module, act: Act) -> Tensor:
    """`act(bn(z))`."""
    return _stages.norm_act(z, bn, **_act_arguments(act))


def norm_act_conv(z: Tensor, bn: nn.Module, act: Act, conv: nn.Module) -> Tensor:
    """`conv(act(bn(z)))`; the activated tensor is not kept for backward."""
    return _stages.norm_act_conv(z, bn, conv, **_act_arguments(act))


def norm_act_pool(z: Tensor, bn: nn.Module, act: Act) -> Tensor:
    """`max_pool2d(act(bn(z)), 3, stride=2, padding=1)`."""
    return _stages.norm_act_pool(z, bn, **_act_arguments(act))


def norm_add_act(z: Tensor, bn: nn.Module, residual: Tensor, act: Act, inplace: bool) -> Tensor:
    """`act(bn(z) + residual)`."""
    if why_stock_residual(z, residual) is not None:
        return _stock_add_act(bn(z), residual, act, inplace)
    return _stages.norm_act(z, bn, residual, **_act_arguments(act))


def dual_norm_act(
    z: Tensor, bn: nn.Module, residual: Tensor, residual_bn: nn.Module, act: Act, inplace: bool
) -> Tensor:
    """`act(bn(z) + residual_bn(residual))`."""
    if why_stock_residual(z, residual) is not None:
        return _stock_add_act(bn(z), residual_bn(residual), act, inplace)
    return _stages.dual_norm_act(z, bn, residual, residual_bn, **_act_arguments(act))


def add_act(x: Tensor, residual: Tensor, act: Act, inplace: bool) -> Tensor:
    """`act(x + residual)`."""
    if why_stock_tensors((x,)) is not None or why_stock_residual(x, residual) is not None:
        return _stock_add_act(x, residual, act, inplace)
    return ops.add_act(x, residual, **_act_arguments(act))
