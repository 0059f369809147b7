"""The operator behind a whole residual block. What it takes is `fused_resnet.nn._block`'s to know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fused_resnet.ops import _native

# Positions of an image; larger ones are all alike to takes_convolution().
SMALL_IMAGE: int = 0 if _native.C is None else _native.C.SMALL_IMAGE


class Norm(Protocol):
    """What is read of a batch norm; the (C,) tensors may be None."""

    @property
    def running_mean(self) -> Tensor | None: ...
    @property
    def running_var(self) -> Tensor | None: ...
    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def training(self) -> bool: ...
    @property
    def momentum(self) -> float: ...
    @property
    def eps(self) -> float: ...


def residual_block(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    norms: Sequence[Norm],
    geometry: Sequence[int],
    counts: Sequence[int],
    downsample: bool,
    recompute: bool = False,
    preact: bool = False,
) -> Tensor:
    """`relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut)`; updates the running statistics.

    With `preact` it is `conv_n(relu(bn_n(... conv_1(relu(bn_1(x)))))) + shortcut`.

    Args:
        x: `(N, C, H, W)`, channels_last, on the CPU.
        conv_weights: `(O, I, KH, KW)` of each convolution of the main path, then of the shortcut's if there is one.
        norms: the batch norm behind each; with `preact` before each of the main path, and the shortcut has none.
        geometry: seven integers for each convolution: stride, padding, dilation (rows, columns) and groups.
        counts: values per channel of each batch norm.
        downsample: whether the last convolution is the shortcut's; without it the shortcut is x. With `preact` it reads
            relu(bn_1(x)).
        recompute: backward computes the output of the main path's last convolution again instead of keeping it.
        preact: whether the batch norms stand before the convolutions.
    """
    arguments = (
        x,
        conv_weights,
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.training for norm in norms],
    )
    eps = [norm.eps for norm in norms]
    where = (downsample, recompute, preact)
    if not torch.compiler.is_compiling():
        momenta = [norm.momentum for norm in norms]
        y: Tensor = _native.C.residual_block(*arguments, momenta, eps, geometry, counts, *where)
        return y
    result = torch.ops.fused_resnet.residual_block.default(*arguments, eps, geometry, *where)
    statistics = iter(result[1:])
    for norm, values in zip(norms, counts, strict=True):
        if norm.training:
            mean, var = next(statistics), next(statistics)
            if norm.running_mean is not None:
                torch.ops.fused_resnet.batch_norm_update_.default(
                    norm.running_mean, norm.running_var, mean, var, values, norm.momentum
                )
    output: Tensor = result[0]
    return output


def takes_convolution(
    shape: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int], groups: int, small: bool
) -> bool:
    """Whether the convolutions inside a block can be one with a weight of this shape.

    `small`: its output has at most `SMALL_IMAGE` positions. Not asked without groups.
    """
    return _takes_convolution(tuple(shape), stride, dilation, groups, small)


@functools.cache
def _takes_convolution(
    shape: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int], groups: int, small: bool
) -> bool:
    supported: bool = _native.C.conv_supported(shape, stride, dilation, groups, small)
    return supported


# What torch.compiler.assume_constant_result does; called at import, that would import the whole compiler.
takes_convolution._dynamo_marked_constant = True  # type: ignore[attr-defined]
