"""A whole residual block as one operator: what it takes, and the call.

On the CPU the convolutions are the package's own, and a block's batch norms and activations happen inside them. A block
that this does not fit runs as the stages of `_stages`, one operator for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import _extension
from fused_resnet.nn._norm import count, operands
from fused_resnet.nn.guard import parameters_of, why_stock_downsample
from fused_resnet.ops import _block as ops_block

_AVAILABLE = _extension.available()  # the operator has no form in stock PyTorch: the stages have
# conv_supported() of csrc/cpu/conv/driver.cpp
_MOST_TAPS = 16
_MOST_REACH = 8
_MOST_STRIDE = 16
# own_groups() of csrc/bindings/conv_norm.cpp
_LEAST_GROUP = 4
_FULL_GROUP = 16
_SMALL_EXTENT = 14 * 14


def residual_block(
    x: Tensor,
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    downsample: nn.Module | None,
    memory: str = "keep",
) -> Tensor | None:
    """`relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + downsample(x))`, or None where that is no single operator.

    `convs` and `norms` are plain Conv2d and BatchNorm2d, as the guard has seen; a `downsample` that is not exactly a
    convolution and a batch norm is no part of the operator. `memory`: see `set_memory`.
    """
    if not _takes(x):
        return None
    extents = _extents(x, convs)
    recompute = memory == "recompute" and convs[-1].__dict__["kernel_size"] == (1, 1)
    if downsample is None:
        if convs[-1].__dict__["out_channels"] != x.shape[1] or extents[-1] != tuple(x.shape[2:]):
            return None
    else:
        if why_stock_downsample(downsample) is not None:
            return None
        shortcut_conv, shortcut_bn = downsample.__dict__["_modules"].values()
        shortcut_extent = _extents(x, [shortcut_conv])[0]
        same_width = shortcut_conv.__dict__["out_channels"] == convs[-1].__dict__["out_channels"]
        if not same_width or shortcut_extent != extents[-1]:
            return None
        convs, norms, extents = [*convs, shortcut_conv], [*norms, shortcut_bn], [*extents, shortcut_extent]
    if any(norm is other for i, norm in enumerate(norms) for other in norms[:i]):
        return None  # one that has two batches counts the first before it weighs the second
    weights: list[Tensor] = []
    for conv, extent in zip(convs, extents, strict=True):
        weight = _weight(x, conv.__dict__)
        if weight is None or not _takes_groups(conv.__dict__, extent):
            return None
        weights.append(weight)
    counts = [x.shape[0] * h * w for h, w in extents]
    read = [operands(norm) for norm in norms]
    for values, norm in zip(counts, read, strict=True):
        if norm.training and values < 2:
            return None  # the stages refuse it, with PyTorch's error
    y = ops_block.residual_block(x, weights, read, _geometry(convs), counts, downsample is not None, recompute)
    for norm_module in norms:
        count(norm_module)
    return y


def set_memory(model: nn.Module, memory: str) -> None:
    """Says what the residual blocks of `model` keep for backward.

    Args:
        model: changed in place: every `BasicBlock` and `Bottleneck` in it.
        memory: "keep", what every convolution put out, or "recompute", all but the last 1x1 convolution's, which is
            the widest tensor of a bottleneck and is computed again, to the same bits: less memory, about a tenth more
            time. Blocks that end in another convolution, or that do not run as one operator, keep as before.

    Raises:
        ValueError: another `memory`.
    """
    if memory not in ("keep", "recompute"):
        raise ValueError(f"set_memory: expected memory 'keep' or 'recompute', got {memory!r}")
    for module in model.modules():
        if hasattr(type(module), "memory"):
            module.memory = memory  # type: ignore[assignment]


def _takes(x: Tensor) -> bool:
    if not _AVAILABLE or not x.is_cpu:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return False
    return not torch.is_autocast_enabled("cpu") or x.dtype is torch.get_autocast_dtype("cpu")


def _extents(x: Tensor, convs: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Height and width behind each convolution."""
    extent = (x.shape[2], x.shape[3])
    result = []
    for conv in convs:
        c = conv.__dict__
        h, w = (
            (extent[i] + 2 * c["padding"][i] - c["dilation"][i] * (c["kernel_size"][i] - 1) - 1) // c["stride"][i] + 1
            for i in range(2)
        )
        extent = (h, w)
        result.append(extent)
    return result


def _weight(x: Tensor, conv: dict[str, Any]) -> Tensor | None:
    """The weight, or None where this convolution is not ours."""
    parameters = parameters_of(conv)
    weight: Tensor = parameters["weight"]
    if parameters["bias"] is not None or max(conv["kernel_size"]) > _MOST_TAPS:
        return None
    for taps, dilation, stride in zip(conv["kernel_size"], conv["dilation"], conv["stride"], strict=True):
        if taps > 1 and ((dilation > 1 and dilation * (taps - 1) > _MOST_REACH) or stride > _MOST_STRIDE):
            return None
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled("cpu"):
        return None
    return weight


def _takes_groups(conv: dict[str, Any], extent: tuple[int, int]) -> bool:
    """Whether the kernels are faster: own_groups() of csrc/bindings/conv_norm.cpp."""
    channels, groups = conv["in_channels"], conv["groups"]
    group: int = channels // groups
    whole = channels == conv["out_channels"] and group >= _LEAST_GROUP and group.bit_count() == 1
    small = group >= _FULL_GROUP and extent[0] * extent[1] <= _SMALL_EXTENT and conv["stride"] == (1, 1)
    return groups == 1 or (whole and not small)


def _geometry(convs: Sequence[nn.Module]) -> list[int]:
    geometry: list[int] = []
    for conv in convs:
        c = conv.__dict__
        geometry += [*c["stride"], *c["padding"], *c["dilation"], c["groups"]]
    return geometry
