"""Places for values of different sizes and lifetimes in as little memory as a simple rule finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """`size` bytes that are written at step `begin` and last read at step `end`."""

    begin: int
    end: int
    size: int


def place(lifetimes: Sequence[Lifetime]) -> list[int]:
    """An offset for each: those that live at the same step do not overlap.

    The largest come first, each at the lowest offset that is free for its whole life. Source: Pisarchyk and Lee,
    "Efficient Memory Management for Deep Neural Net Inference", 2020 (greedy by size).
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for i in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].begin)):
        one = lifetimes[i]
        others = [j for j in placed if lifetimes[j].begin <= one.end and one.begin <= lifetimes[j].end]
        at = 0
        for j in sorted(others, key=offsets.__getitem__):
            if offsets[j] - at >= one.size:
                break
            end = offsets[j] + lifetimes[j].size
            at = max(at, -(-end // _ALIGNMENT) * _ALIGNMENT)
        offsets[i] = at
        placed.append(i)
    return offsets
