"""A plan in words and figures."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import _extension
from fused_resnet.inference import graph as g
from fused_resnet.inference.plan import Line, Plan
from fused_resnet.inference.weights import Numerics, Weights

# A 1x1 convolution whose operands stay in the caches of every thread.
_CHANNELS, _POSITIONS, _CALLS = 256, 196, 30


def table(plan: Plan, x: Tensor, calls: int) -> str:
    """One line for each step: what, output, kernel, time, GFLOP/s and share of the ceiling."""
    plan(x)
    best = [float("inf")] * len(plan.lines)
    for _ in range(max(calls, 1)):
        seconds: list[float] = []
        plan(x, seconds)
        best = list(map(min, best, seconds))
    peak = ceiling(x.dtype, plan.numerics)
    rows: list[tuple[str, ...]] = [("step", "output", "ms", "GFLOP/s", "ceiling", "kernel")]
    rows += [_row(plan, line, seconds, peak) for line, seconds in zip(plan.lines, best, strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    text = "\n".join(
        "  ".join(
            [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))]
        )
        + "  "
        + row[-1]
        for row in rows
    )
    flops, total = sum(line.flops for line in plan.lines), max(sum(best), 1e-9)
    stock = [f"{line.step.name} ({_what(line)})" for line in plan.lines if line.native is None]
    return "\n".join(
        [
            text,
            f"{total * 1e3:.3f} ms, {flops / total / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} in {x.dtype} with "
            f"{torch.get_num_threads()} threads; {plan.arena_bytes() / 2**20:.1f} MiB between the steps",
            f"run by PyTorch's operators: {', '.join(stock)}" if stock else "every step has a kernel of its own",
        ]
    )


def ceiling(dtype: torch.dtype, numerics: Numerics) -> float:
    """Floating-point operations a second of a convolution that stays in the cache, with PyTorch's number of threads.

    Where floats may be split, which larger layers are, the faster of both ways.
    """
    splits = dtype == torch.float32 and _extension.extension().current_isa() == "amx"
    return max(_sustained(dtype, parts) for parts in ({0, numerics[1]} if splits else {0}))


def _sustained(dtype: torch.dtype, parts: int) -> float:
    threads = torch.get_num_threads()
    weight = torch.randn(_CHANNELS, _CHANNELS, 1, 1) / _CHANNELS**0.5
    graph = g.Graph((g.Conv("", (0,), 1, "weight"),), 0, (1,), None, {"weight": weight}, _CHANNELS)
    shape = (threads, _CHANNELS, _POSITIONS, 1)
    plan = Plan(graph, shape, Weights(graph, dtype), numerics=(False, parts, False))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    seconds: list[float] = []
    for _ in range(_CALLS):
        plan(x, seconds)
    return plan.lines[0].flops / min(seconds)


def _row(plan: Plan, line: Line, seconds: float, peak: float) -> tuple[str, ...]:
    speed = line.flops / max(seconds, 1e-9)
    return (
        line.step.name,
        "x".join(map(str, line.shape)),
        f"{seconds * 1e3:.3f}",
        f"{speed / 1e9:.0f}" if line.flops else "",
        f"{speed / peak:.0%}" if line.flops else "",
        f"{_what(line)}: " + (plan.native.kernel(line.native) if line.native is not None else "PyTorch's operator"),
    )


def _what(line: Line) -> str:
    step = line.step
    if isinstance(step, g.Stock):
        return step.target
    parts = [type(step).__name__]
    if isinstance(step, g.Conv):
        parts = [f"norm + {step.pre.kind} + Conv"] if step.scale is not None else parts
        parts += ["add"] * (len(step.inputs) > 1)
    act = getattr(step, "act", g.IDENTITY)
    return " + ".join(parts + [act.kind] * (act.kind != "identity"))
