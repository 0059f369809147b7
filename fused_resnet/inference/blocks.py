"""How many images go through a run of steps at once: few enough that what one writes is in the cache for the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step reads and writes for each image, and of its weight."""

    image: int
    weight: int = 0


@dataclass(frozen=True)
class Block:
    """Steps [begin, end), `images` at a time."""

    begin: int
    end: int
    images: int


def blocks(traffic: Sequence[Traffic], batch: int, cache: int) -> list[Block]:
    """Cuts a network into runs of steps.

    A step that stands alone would take as many images as fit into `cache` bytes, or all of them where its weight, which
    is read once for each block, would cost more than that saves. Activations shrink along a network, so a new run
    begins where every later step would take at least twice as many.
    """
    alone = [_fitting(step, batch, cache) for step in traffic]
    later = alone[:]
    for i in reversed(range(len(later) - 1)):
        later[i] = min(later[i], later[i + 1])
    result: list[Block] = []
    for i, images in enumerate(later):
        if result and images < 2 * result[-1].images:
            result[-1] = Block(result[-1].begin, i + 1, result[-1].images)
        else:
            result.append(Block(i, i + 1, images))
    return result


def _fitting(step: Traffic, batch: int, cache: int) -> int:
    """A divisor of `batch`."""
    most = max(cache // max(step.image, 1), 1)
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    return batch if 2 * step.weight > images * step.image else images
