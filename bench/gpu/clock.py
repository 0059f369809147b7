"""Interleaved timing by CUDA events: what the GPU needed, not what the host waited."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from fused_resnet import testing


def sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call. Calls queue up behind each other: launch latency shows only where it is the bottleneck."""
    if device.type != "cuda":  # for trying the scripts out
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    sample_seconds: float,
    warmup: int = 3,
) -> testing.Comparison:
    """Calls the contestants in turn, as `testing.interleave` does, with the GPU's own clock.

    Args:
        contestants: name to function without arguments.
        device: where they run.
        rounds: samples of each.
        sample_seconds: about how long a sample of the slowest lasts; all are repeated equally often.
        warmup: untimed calls of each.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup):
            contestants[name]()
    slowest = max(sample(contestants[name], 1, device) for name in names)
    repeats = max(1, round(sample_seconds / max(slowest, 1e-9)))
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(sample(contestants[name], repeats, device))
    finally:
        gc.enable()
    return testing.Comparison(seconds)
