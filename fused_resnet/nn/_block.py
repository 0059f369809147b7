"""A whole block as one operator: what it takes, and the call.

On the CPU the convolutions are the package's own, and a block's batch norms and activations happen inside them. A block
that this does not fit runs as the stages of `_stages`, one operator for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import _extension
from fused_resnet.nn._norm import count, operands
from fused_resnet.nn.guard import FusedUnit, pair, parameters_of, why_stock_conv, why_stock_downsample
from fused_resnet.ops import _block as ops_block

Pair = tuple[int, int]

_AVAILABLE = _extension.available()  # the operator has no form in stock PyTorch: the stages have


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
    if downsample is None:
        return _run(x, convs, norms, False, memory=memory)
    if why_stock_downsample(downsample) is not None:
        return None
    shortcut_conv, shortcut_bn = downsample.__dict__["_modules"].values()
    return _run(x, [*convs, shortcut_conv], [*norms, shortcut_bn], True, memory=memory)


def preact_block(
    x: Tensor, convs: Sequence[nn.Module], norms: Sequence[nn.Module], downsample: nn.Module | None
) -> Tensor | None:
    """`conv_n(relu(bn_n(... conv_1(a)))) + shortcut`, a = relu(bn_1(x)), or None where that is no single operator.

    The shortcut is x, or `downsample(a)` where that is a plain convolution.
    """
    if not _takes(x):
        return None
    if downsample is None:
        return _run(x, convs, norms, False, preact=True)
    if why_stock_conv(downsample) is not None:
        return None
    return _run(x, [*convs, downsample], norms, True, preact=True)


def _run(
    x: Tensor,
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    downsample: bool,
    *,
    preact: bool = False,
    memory: str = "keep",
) -> Tensor | None:
    """The operator; with `downsample` the last of `convs` is the shortcut's. With `preact` it has no batch norm."""
    main = convs[:-1] if downsample else convs
    geometries = [_Geometry.of(conv.__dict__) for conv in convs]
    extents = _extents(x, geometries[: len(main)])
    end = (geometries[len(main) - 1].filters, extents[-1])
    shortcut = (x.shape[1], tuple(x.shape[2:]))
    if downsample:
        extents += _extents(x, geometries[-1:])
        shortcut = (geometries[-1].filters, extents[-1])
    if shortcut != end:
        return None
    if any(norm is other for i, norm in enumerate(norms) for other in norms[:i]):
        return None  # one that has two batches counts the first before it weighs the second
    weights: list[Tensor] = []
    for conv, geometry, extent in zip(convs, geometries, extents, strict=True):
        weight = _weight(x, conv.__dict__, geometry, extent)
        if weight is None:
            return None
        weights.append(weight)
    normalised = [(x.shape[2], x.shape[3]), *extents[: len(main) - 1]] if preact else extents
    counts = [x.shape[0] * h * w for h, w in normalised]
    read = [operands(norm) for norm in norms]
    for values, norm in zip(counts, read, strict=True):
        if norm.training and values < 2:
            return None  # the stages refuse it, with PyTorch's error
    recompute = memory == "recompute" and geometries[len(main) - 1].kernel == (1, 1)
    y = ops_block.residual_block(x, weights, read, _flat(geometries), counts, downsample, recompute, preact)
    for norm_module in norms:
        count(norm_module)
    return y


def set_memory(model: nn.Module, memory: str) -> None:
    """Says what the residual blocks of `model` keep for backward.

    Args:
        model: changed in place: every `BasicBlock` and `Bottleneck` in it.
        memory: "keep", what every convolution put out, or "recompute", all but the last 1x1 convolution's, which is
            the widest tensor of a bottleneck and is computed again, to the same bits where `fused_resnet.numerics` is
            what it was: less memory, about a tenth more time. Blocks that end in another convolution, or that do not
            run as one operator, keep as before.

    Raises:
        ValueError: another `memory`.
    """
    if memory not in ("keep", "recompute"):
        raise ValueError(f"set_memory: expected memory 'keep' or 'recompute', got {memory!r}")
    for module in model.modules():
        if isinstance(module, FusedUnit) and hasattr(type(module), "memory"):
            module.memory = memory  # type: ignore[assignment]


def _takes(x: Tensor) -> bool:
    if not _AVAILABLE or not x.is_cpu:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return False
    return not torch.is_autocast_enabled("cpu") or x.dtype is torch.get_autocast_dtype("cpu")


class _Geometry(NamedTuple):
    """Of one convolution, as (rows, columns): what its module was given may be changed to anything that ATen takes."""

    filters: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, conv: dict[str, Any]) -> _Geometry:
        filters, _, rows, columns = parameters_of(conv)["weight"].shape
        stride, padding, dilation = pair(conv["stride"]), pair(conv["padding"]), pair(conv["dilation"])
        return cls(filters, (rows, columns), stride, padding, dilation, conv["groups"])


def _extents(x: Tensor, geometries: Sequence[_Geometry]) -> list[Pair]:
    """Height and width behind each convolution."""
    extent = (x.shape[2], x.shape[3])
    result = []
    for g in geometries:
        h, w = (
            (extent[i] + 2 * g.padding[i] - g.dilation[i] * (g.kernel[i] - 1) - 1) // g.stride[i] + 1 for i in range(2)
        )
        extent = (h, w)
        result.append(extent)
    return result


def _weight(x: Tensor, conv: dict[str, Any], g: _Geometry, extent: Pair) -> Tensor | None:
    """The weight, or None where this convolution, with an output of this extent, is not ours."""
    parameters = parameters_of(conv)
    weight: Tensor = parameters["weight"]
    if parameters["bias"] is not None:
        return None
    small = False
    if g.groups > 1 and extent[0] * extent[1] <= ops_block.SMALL_IMAGE:
        small = True  # a constant to torch.compile, where the comparison is a symbol
    if not ops_block.takes_convolution(weight.shape, g.stride, g.dilation, g.groups, small):
        return None
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled("cpu"):
        return None
    return weight


def _flat(geometries: Sequence[_Geometry]) -> list[int]:
    return [i for g in geometries for i in (*g.stride, *g.padding, *g.dilation, g.groups)]
