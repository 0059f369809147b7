"""What this machine can do at best: multiply-adds on operands that stay in the cache, and a copy that does not.

No processor's data sheet says what a virtual machine's core reaches, so the ceiling is the best that anything here
sustained: a matrix product, or a convolution that fits in the cache. What is timed later counts too, see `counts`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import timing
import torch
from conv_cases import Case, Convolution

from fused_resnet import testing

MATRICES = (512, 1024)
# channels, extent: convolutions of one image for each thread, of about a megabyte
CACHED = ((64, 56), (128, 28), (128, 14))
COPY_BYTES = 256 << 20


@dataclass(frozen=True)
class Ceiling:
    """The most that one dtype, or memory, reached with `threads`, and who."""

    kind: str  # a dtype's name, or "copy": bytes read and written
    threads: int
    per_s: float
    by: str

    def to_json(self) -> dict[str, object]:
        """A JSON object; `per_s` is in GFLOP/s, of the copy in GB/s."""
        unit = "gb_per_s" if self.kind == "copy" else "gflop_per_s"
        return {"name": self.kind, "threads": self.threads, unit: round(self.per_s / 1e9, 2), "by": self.by}


def _probes(dtype: torch.dtype, threads: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Calls and the operations that each does."""
    probes: dict[str, tuple[Callable[[], object], float]] = {}
    for n in MATRICES:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        probes[f"matmul {n}"] = (lambda a=a, b=b: torch.mm(a, b), 2.0 * n**3)  # type: ignore[misc]
    for channels, extent in CACHED:
        for side, kernel in (("aten", 3), ("own", 1)):
            shape = Convolution("", 1, "first", channels, channels, extent, extent, kernel, 1, kernel // 2, 1, 1)
            case = Case(shape, threads, dtype)
            if counts(side, kernel):
                probes[f"{side} conv {shape}"] = (getattr(case.pass_("forward"), side), case.flops())
    return probes


def counts(side: str, kernel: int) -> bool:
    """Whether a convolution's speed says what the machine multiplies.

    Not where ours may run Winograd's algorithm: it multiplies up to four times less than is counted.
    """
    return side == "aten" or kernel == 1


def _best(
    kind: str, threads: int, probes: Mapping[str, tuple[Callable[[], object], float]], options: argparse.Namespace
) -> Ceiling:
    calls = {name: call for name, (call, _) in probes.items()}
    result = testing.interleave(calls, rounds=options.rounds, clock=timing.CLOCKS[options.clock])
    # The faster quarter: neighbours on a shared machine only ever take away.
    rates = {name: work / result.time(name).q1 for name, (_, work) in probes.items()}
    by = max(rates, key=lambda name: rates[name])
    return Ceiling(kind, threads, rates[by], by)


def measure(options: argparse.Namespace) -> list[Ceiling]:
    """The ceilings of the dtypes and of a copy, with one thread and with as many as torch has now."""
    chosen = torch.get_num_threads()
    found = []
    for threads in sorted({1, chosen}):
        torch.set_num_threads(threads)
        found += [_best(name, threads, _probes(timing.DTYPES[name], threads), options) for name in options.dtype]
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
        target = torch.zeros_like(source)
        copy = {f"copy of {COPY_BYTES >> 20} MiB": (lambda s=source, t=target: t.copy_(s), 2.0 * COPY_BYTES)}
        found.append(_best("copy", threads, copy, options))  # type: ignore[arg-type]
    torch.set_num_threads(chosen)
    return found
