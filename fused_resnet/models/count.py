"""Parameters and multiply-adds of a model, without doing the arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Count(NamedTuple):
    """What `count` found: `params` learnable numbers, `macs` multiply-adds of convolutions and linear layers."""

    params: int
    macs: int


def count(model: nn.Module, input_size: int | Sequence[int]) -> Count:
    """Count a model's parameters and its convolutions' and linear layers' multiply-adds.

        macs(conv) = N * C_out * H_out * W_out * (C_in / groups) * k_h * k_w;  macs(linear) = rows * in * out

    Biases, normalisation, activation, pooling and functional calls are not counted, as in the papers' tables.

    Args:
        model: any model that takes one image batch. It is not run: a copy without storage is, in eval mode, on the
            meta device, without the model's hooks.
        input_size: `(C, H, W)` of one image; `(N, C, H, W)` counts the multiply-adds of a batch; `H` or `(H, W)` takes
            C from the model's first convolution.
    Returns:
        `Count(params, macs)`; parameters that are shared count once.
    Raises:
        ValueError: input_size is not one to four positive integers.
    Source: He et al. 2015, tables 1 and 6 (multiply-adds, there called FLOPs).
    """
    twin = _without_storage(model)
    macs = 0

    def add(layer: nn.Module, _: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(layer.weight, torch.Tensor)
        macs += output.numel() * layer.weight[0].numel()

    for module in twin.modules():
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            module.register_forward_hook(add)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        twin(torch.empty(_batch_shape(twin, input_size), dtype=dtype, device="meta"))
    return Count(sum(p.numel() for p in model.parameters()), macs)


def _without_storage(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters and buffers hold no memory and whose hooks are gone."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _batch_shape(model: nn.Module, input_size: int | Sequence[int]) -> tuple[int, ...]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) not in (2, 3, 4) or not all(isinstance(extent, int) and extent > 0 for extent in size):
        raise ValueError(f"count: expected input_size H, (H, W), (C, H, W) or (N, C, H, W), got {input_size!r}")
    if len(size) == 2:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        size = (first.in_channels if first is not None else 3, *size)
    return size if len(size) == 4 else (1, *size)
