"""Activation names, their integers in the operator schemas (`Activation` in `types.h`), and their stock functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, int] = {
    "identity": 0,
    "relu": 1,
    "leaky_relu": 2,
    "prelu": 3,
    "sigmoid": 4,
    "tanh": 5,
    "silu": 6,
}


def activation_code(op: str, act: str) -> int:
    """Return the integer of an activation's name; `op` is named in the error."""
    code = ACTIVATIONS.get(act) if isinstance(act, str) else None
    if code is None:
        raise ValueError(f"{op}: expected act to be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return code


def check_activation(op: str, act: str, act_weight: Tensor | None) -> None:
    """Refuse an unknown activation, and `act_weight` missing or given in vain."""
    activation_code(op, act)
    if (act == "prelu") != (act_weight is not None):
        got = "None" if act_weight is None else f"a tensor with act={act!r}"
        raise ValueError(f"{op}: expected act_weight with act='prelu' and only then, got {got}")


def apply_activation(y: Tensor, act: str, negative_slope: float, act_weight: Tensor | None) -> Tensor:
    """Apply a checked activation with stock PyTorch."""
    if act == "identity":
        return y
    if act == "relu":
        return F.relu(y)
    if act == "leaky_relu":
        return F.leaky_relu(y, negative_slope)
    if act == "prelu":
        assert act_weight is not None
        return F.prelu(y, act_weight.to(y.dtype))
    if act == "sigmoid":
        return torch.sigmoid(y)
    if act == "tanh":
        return torch.tanh(y)
    return F.silu(y)
