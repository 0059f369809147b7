"""Training steps of ResNet-18 and -50 at batch 256 on a GPU: eager AMP, torch.compile and ours, bf16 and fp16.

Loss and gradients are compared first, with eager fp32 as the judge, as bench/models.py does; then all contestants take
turns together. Settings for which there is time to compile come first; the others are then timed without torch.compile
and say so, which makes the run incomplete. With --graphs every contestant's whole step is a CUDA graph. Peak memory is
the allocator's, during a contestant's second step, above what was there before it was built. A batch that does not fit
is halved.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timing
import torch
from models import BF16_FACTOR, BF16_MOST, BF16_SLACK, LOSS_TOLERANCE, Setting
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from gpu import common, schedule
from gpu.clock import interleave
from gpu.common import Row
from gpu.steps import build, captured, exact_convolutions, gradient_of, loss_and_gradient, step_of

SECONDS_OF_A_SETTING, SECONDS_TO_COMPILE = 15.0, {"resnet18": 35.0, "resnet50": 70.0}
COMPILED_BEFORE = 0.5  # of that time, when what gpu.models compiled is in Inductor's cache
GRAPH_COSINE = 0.9  # of a replayed step's gradient and the same side's ungraphed one


def verify(setting: Setting, where: torch.device) -> Row:
    """Compares fused with eager, both under AMP, by their distance from eager fp32; returns the errors and the batch.

    fp32 needs twice the memory: where it does not fit, a part of the batch is compared.
    """
    model, x, target = build(setting, where)
    batch = setting.batch
    while True:
        try:
            with exact_convolutions():
                exact = loss_and_gradient(model, x[:batch], target[:batch], "eager", "fp32")
            eager, fused = (
                loss_and_gradient(model, x[:batch], target[:batch], side, setting.dtype) for side in ("eager", "fused")
            )
            break
        except torch.OutOfMemoryError:
            if batch <= schedule.SMALLEST_BATCH:
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
    errors = {}
    for index, (what, slack) in enumerate((("loss", LOSS_TOLERANCE), ("gradient", BF16_SLACK))):
        errors[f"eager_{what}"] = timing.relative_error(eager[index], exact[index])
        allowed = min(BF16_FACTOR * errors[f"eager_{what}"] + slack, BF16_MOST)
        errors[what] = timing.verify(f"{setting}: {what}", [fused[index]], [exact[index]], allowed)
    return {"error": {key: float(f"{value:.3g}") for key, value in errors.items()}, "verified_batch": batch}


class Contestant:
    """One way to run the step, with the memory that it takes."""

    def __init__(self, start: nn.Module, x: Tensor, target: Tensor, side: str, setting: Setting) -> None:
        on_gpu = x.device.type == "cuda"
        gc.collect()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self.side, self.setting = side, setting
        self.model = copy.deepcopy(start)
        self.step: Callable[[], Tensor] = step_of(self.model, x, target, side, setting.dtype)
        self.call: Callable[[], object] = self.step
        self.loss = self.step()
        if on_gpu:  # the first step also tries algorithms out, or compiles
            torch.cuda.reset_peak_memory_stats()
        self.step()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if on_gpu else None

    def capture(self, pool: Any) -> None:
        """Makes its step a CUDA graph, and compares what a replay gives with what the plain step gave."""
        expected = gradient_of(self.model).clone()
        self.call, loss = captured(self.step, pool)
        self.call()
        what = f"{self.setting}: {self.side}, replayed"
        timing.verify(f"{what}: loss", [loss], [self.loss], 10 * LOSS_TOLERANCE)
        cosine = float(nn.functional.cosine_similarity(gradient_of(self.model), expected, dim=0))
        if not cosine >= GRAPH_COSINE:
            raise SystemExit(f"{what}: gradient disagrees with the plain step: cosine {cosine:.3f}")


def refuse_stock(contestant: Contestant, options: argparse.Namespace) -> None:
    """Exits unless ours ran fused throughout, and eager nowhere."""
    if contestant.side == "compile":  # the compiled code has batch norms of no name
        return
    calls = testing.count_batch_norms(contestant.step)
    right = calls.fused and not calls.stock if contestant.side == "fused" else not calls.fused
    if not right and not options.allow_stock:
        raise SystemExit(
            f"{contestant.side}: {calls.fused} batch norms ran fused, {calls.stock} stock: {fr.build_info()}"
        )


def enter(
    setting: Setting, sides: Sequence[str], where: torch.device, options: argparse.Namespace
) -> tuple[list[Contestant], Row]:
    """The contestants, ready to run. Without torch.compile the others still count: what it died of is a failure."""
    start, x, target = build(setting, where)
    pool = torch.cuda.graph_pool_handle() if options.graphs else None
    contestants, failure = [], {}
    for side in sides:
        try:
            contestant = Contestant(start, x, target, side, setting)
            refuse_stock(contestant, options)
            if options.graphs:
                contestant.capture(pool)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            if side != "compile":
                raise
            failure = {"failed": f"torch.compile: {common.reason(error)}"}
        else:
            contestants.append(contestant)
    return contestants, failure


def measure(setting: Setting, sides: Sequence[str], where: torch.device, options: argparse.Namespace) -> Row:
    """Verifies and times one setting."""
    row: Row = {
        "name": setting.model, "batch": setting.batch, "size": setting.size, "dtype": setting.dtype,
        "layout": setting.layout, "pass": "training step", "graphs": options.graphs,
    }  # fmt: skip
    row |= verify(setting, where)
    contestants, failure = enter(setting, sides, where, options)
    sides = [contestant.side for contestant in contestants]
    row |= {"sides": sides, **failure}
    for contestant in contestants:
        if contestant.peak_bytes is not None:
            row[f"{contestant.side}_peak_bytes"] = contestant.peak_bytes
    result = interleave(
        {c.side: c.call for c in contestants}, where, rounds=options.rounds, sample_seconds=options.sample, warmup=2
    )
    return schedule.with_times(row, result)


def line(row: Row) -> str:
    """One result as a line of text."""
    text = f"{row['name']:<10}batch {row['batch']:<5}{row['dtype']:<6}{'graph ' if row['graphs'] else 'plain '}"
    sides = row["sides"]
    assert isinstance(sides, list)
    for side in sides:
        text += f"{side} {row[f'{side}_images_per_s']:>9} img/s  "
    for key, name in (("speedup", "eager"), ("speedup_over_compile", "compile")):
        if key in row:
            spread = row[key]
            assert isinstance(spread, dict)
            text += f"{spread['median']:.3f}x {name} [{spread['q1']:.3f}, {spread['q3']:.3f}]  "
    if "eager_peak_bytes" in row:
        text += f"memory {int(str(row['fused_peak_bytes'])) / int(str(row['eager_peak_bytes'])):.2f}x"
    return text.rstrip() + "".join(f"  {key}: {row[key]}" for key in ("failed", "skipped") if key in row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=130)
    parser.add_argument("--model", nargs="+", default=["resnet50", "resnet18"], help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--graphs", action="store_true", help="whole steps as CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample", type=float, default=0.2, help="seconds of a sample (default: %(default)s)")
    parser.add_argument("--allow-stock", action="store_true", help="time even what does not run fused")
    options = parser.parse_args(arguments)
    where = common.device(options)
    if options.graphs and where.type != "cuda":
        raise SystemExit("--graphs: CUDA graphs need a GPU")
    report = common.Report("graphs" if options.graphs else "models", options, where)
    sides = ["eager", "fused"] if options.no_compile else ["eager", "compile", "fused"]
    settings = [
        Setting(name, options.batch, options.size, dtype, "channels_last")
        for dtype, name in itertools.product(options.dtype, options.model)
    ]
    compiled_before = COMPILED_BEFORE if options.graphs else 1.0
    work = schedule.Work(
        lambda setting, chosen: measure(setting, chosen, where, options), line, where, SECONDS_OF_A_SETTING,
        {name: seconds * compiled_before for name, seconds in SECONDS_TO_COMPILE.items()}, options.graphs,
    )  # fmt: skip
    schedule.run(settings, sides, work, common.Deadline(options.seconds), report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
