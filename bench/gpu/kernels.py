"""The fused kernels over a model's shapes at batch 256: bandwidth as a fraction of a plain copy's, and against eager.

Each shape is verified, then forward (training), backward and inference are timed in turn with eager PyTorch and with a
copy of the same tensor. A unit's bandwidth is the least number of bytes that it must move (bench/units.py) over its
time. Then every CUDA kernel is timed alone by the profiler, with the bytes that it moves itself.

PyTorch chooses eager's batch norm by layout and dtype: each row says which it took. The eager unit with cuDNN's, called
by name, is a contestant of its own; where cuDNN refuses the operands, a row says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import timing
import torch
from units import Case, cudnn_norm, load_units

import fused_resnet as fr
from fused_resnet import testing
from gpu import common
from gpu.clock import interleave
from gpu.common import Row

PASSES = ("forward", "backward", "infer")
TOLERANCE = {"fp32": 2e-3, "bf16": 1e-2, "fp16": 2e-3}  # of fused against eager in fp32, as in bench/ops.py
PROFILED_CALLS = 5


def kernel_passes(kind: str) -> dict[str, float]:
    """Tensors of x's size that each kernel reads and writes, for one kind of unit (the table in docs/cuda.md)."""
    if kind == "stem_pool":
        return {"stats_kernel": 1, "stem_forward_kernel": 1.25, "stem_reduce_kernel": 1.25, "stem_apply_kernel": 2.25}
    residual, dual = kind in ("bn_add_act", "bn_dual_act"), kind == "bn_dual_act"
    return {
        "stats_kernel": 1 + dual,
        "apply_kernel": 2 + residual,
        "backward_reduce_kernel": 2 + dual,
        "backward_apply_kernel": 3 + residual + dual,
    }


def refuse_stock(case: Case, options: argparse.Namespace) -> None:
    """Exits when the operator would run PyTorch's own batch norm."""
    calls = testing.count_batch_norms(case.call("forward", case.kind.fused))
    if not options.allow_stock and (calls.stock or not calls.fused):
        raise SystemExit(f"{case.unit.kind} {tuple(case.x.shape)} runs stock: {fr.build_info()}")


def cudnn_call(case: Case, passes: str) -> tuple[Callable[[], object] | None, str | None]:
    """The eager unit with cuDNN's batch norm, or why there is none."""
    try:
        found = case.call(passes, partial(case.kind.eager, norm=cudnn_norm))
        found()
        common.synchronize(case.x.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # bfloat16 with parameters in fp32, for one
        return None, common.reason(error)
    return found, None


def profile(call: Callable[[], object], where: torch.device) -> dict[str, float]:
    """Seconds per call of each fused CUDA kernel; an error if the profiler sees none."""
    if where.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = re.search(r"fused_resnet::.*?(\w+_kernel)", event.key)
        if name:
            found[name[1]] += float(event.self_device_time_total) / 1e6 / PROFILED_CALLS
    if not found:
        raise RuntimeError("the profiler saw none of our kernels")
    return dict(found)


def alone(case: Case, dtype: str, copy_gb_per_s: float) -> Row:
    """Each kernel of a training pass on its own: time, and bandwidth where the bytes are known."""
    passes, kernels = kernel_passes(case.unit.kind), {}
    for name, elapsed in profile(case.call("train", case.kind.fused), case.x.device).items():
        kernel: Row = {"seconds": float(f"{elapsed:.4g}")}
        if name in passes and elapsed:
            speed = passes[name] * case.tensor_bytes() / elapsed / 1e9
            kernel |= {"gb_per_s": round(speed, 1), "copy_fraction": round(speed / copy_gb_per_s, 4)}
        kernels[name] = kernel
    beyond_cache = case.tensor_bytes() > common.cache_bytes(case.x.device)
    return {
        "name": case.unit.name, "kind": case.unit.kind, "shape": list(case.x.shape), "dtype": dtype, "passes": "alone",
        "beyond_cache": beyond_cache, "kernels": kernels,
    }  # fmt: skip


def measure(passes: str, case: Case, dtype: str, error: float, options: argparse.Namespace) -> list[Row]:
    """Times one pass of one unit; a row of its own says why cuDNN's batch norm is not among the contestants."""
    unit, where, source = case.unit, case.x.device, case.x.detach()
    target = torch.empty_like(source)
    eager = case.call(passes, case.kind.eager)
    calls: dict[str, Callable[[], object]] = {
        "eager": eager,
        "fused": case.call(passes, case.kind.fused),
        "copy": lambda: target.copy_(source),
    }
    refusals: list[Row] = []
    if case.kind.norm:
        cudnn, why = cudnn_call(case, passes)
        if cudnn is not None:
            calls["cudnn"] = cudnn
        else:
            refusals = [{
                "name": unit.name, "kind": unit.kind, "dtype": dtype, "passes": passes, "contestant": "cudnn",
                "status": "not supported", "why": why,
            }]  # fmt: skip
    # Backward alone holds no forward batch norm to be seen; its forward is the training one.
    seen = eager if passes == "infer" else case.call("forward", case.kind.eager)
    took = testing.count_batch_norms(seen).stock_operators
    result = interleave(calls, where, rounds=options.rounds, sample_seconds=options.sample)
    minimum, size = case.minimum_bytes(passes), case.tensor_bytes()
    ratio = minimum / (2 * size)
    rounds = zip(result.seconds["copy"], result.seconds["fused"], strict=True)
    copy_speed = 2 * size / result.time("copy").median / 1e9
    row: Row = {
        "name": unit.name, "kind": unit.kind, "count": unit.count, "shape": list(case.x.shape), "dtype": dtype,
        "layout": options.layout, "passes": passes, "tensor_bytes": size,
        "beyond_cache": size > common.cache_bytes(where), "minimum_bytes": minimum, "error": float(f"{error:.3g}"),
        "speedup": result.ratio("eager", "fused").to_json(),
        "copy_fraction": testing.Spread.of([copy / fused * ratio for copy, fused in rounds]).to_json(),
        "gb_per_s": round(minimum / result.time("fused").median / 1e9, 1), "copy_gb_per_s": round(copy_speed, 1),
        "eager_batch_norm": dict(took),
    }  # fmt: skip
    if "cudnn" in calls:
        row["speedup_over_cudnn"] = result.ratio("cudnn", "fused").to_json()
    return [row | {f"{name}_seconds": result.time(name).to_json() for name in calls}, *refusals]


def median(row: Row, key: str) -> float:
    """Median of one of a row's spreads."""
    spread = row[key]
    assert isinstance(spread, dict)
    return float(spread["median"])


def line(row: Row) -> str:
    """One result as a line of text."""
    shape = "x".join(str(n) for n in row.get("shape", []))  # type: ignore[attr-defined]
    mark = " " if row.get("beyond_cache") else "c"
    what = f"{row['kind']:<12}{shape:<17}{row['dtype']:<5}{row['passes']:<9}"
    if "status" in row:
        return f"{what}{row['contestant']} {row['status']}: {row['why']}"
    kernels = row.get("kernels")
    if isinstance(kernels, dict):
        return what + (
            ", ".join(f"{name} {k.get('copy_fraction', 0):.0%}" for name, k in kernels.items()) or "not seen"
        )
    return (
        f"{what}{median(row, 'fused_seconds') * 1e6:9.1f} us"
        f"{row['gb_per_s']:>9} GB/s {median(row, 'copy_fraction'):4.0%} of copy {mark}"
        f"{median(row, 'speedup'):6.2f}x eager"
        + (f" {median(row, 'speedup_over_cudnn'):5.2f}x cuDNN's" if "speedup_over_cudnn" in row else "")
    )


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Figures weighted by how often the model holds a unit, for each dtype and pass, and for each kernel by dtype."""
    result: list[Row] = []
    timed = [row for row in rows if "fused_seconds" in row]
    for dtype, passes in dict.fromkeys((row["dtype"], row["passes"]) for row in timed):
        group = [row for row in timed if (row["dtype"], row["passes"]) == (dtype, passes)]
        times = [int(str(row["count"])) * median(row, "fused_seconds") for row in group]
        weighted = list(zip(times, group, strict=True))
        large = [(t, row) for t, row in weighted if row["beyond_cache"]]
        summary: Row = {"name": "all units", "dtype": dtype, "passes": passes, "seconds": float(f"{sum(times):.4g}")}
        summary["speedup"] = round(sum(t * median(row, "speedup") for t, row in weighted) / sum(times), 4)
        rivals = [(t, median(row, "speedup_over_cudnn")) for t, row in weighted if "speedup_over_cudnn" in row]
        if rivals:
            summary["speedup_over_cudnn"] = round(sum(t * s for t, s in rivals) / sum(t for t, _ in rivals), 4)
        took: Counter[str] = Counter()
        for row in group:
            took.update(row["eager_batch_norm"])  # type: ignore[call-overload]
        summary["eager_batch_norm"] = sorted(took)
        if large:
            total = sum(t for t, _ in large)
            summary["copy_fraction"] = round(sum(t * median(row, "copy_fraction") for t, row in large) / total, 4)
            summary["copy_fraction_worst"] = round(min(median(row, "copy_fraction") for _, row in large), 4)
        result.append(summary)
    found: dict[tuple[Any, str], list[float]] = defaultdict(list)
    for row in rows:
        kernels = row.get("kernels", {})
        assert isinstance(kernels, dict)
        for name, kernel in kernels.items():
            if row["beyond_cache"] and "copy_fraction" in kernel:
                found[row["dtype"], name].append(float(kernel["copy_fraction"]))
    for (dtype, name), fractions in found.items():
        spread = testing.Spread.of(fractions)
        result.append(
            {"name": name, "dtype": dtype, "copy_fraction": round(spread.median, 4), "copy_fraction_worst": spread.low}
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=40)
    parser.add_argument("--model", default="resnet50", choices=("resnet18", "resnet50"), help="whose shapes")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layout", choices=timing.LAYOUTS, default="channels_last")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sample", type=float, default=0.006, help="seconds of a sample (default: %(default)s)")
    parser.add_argument("--max-size", type=int, help="shrink images to at most this height and width")
    parser.add_argument("--allow-stock", action="store_true", help="time even what does not run fused")
    options = parser.parse_args(arguments)
    where, deadline = common.device(options), common.Deadline(options.seconds)
    report = common.Report("kernels", options, where)
    for dtype in options.dtype:
        for unit in load_units(options.model):
            if options.max_size:
                height, width = min(unit.height, options.max_size), min(unit.width, options.max_size)
                unit = replace(unit, height=height, width=width)
            what = f"{unit.name} {unit.kind} {dtype}"
            skipped = deadline.skip(2)
            if skipped:
                report.add({"name": unit.name, "kind": unit.kind, "dtype": dtype, "skipped": skipped})
                continue
            try:
                with torch.device(where):
                    case = Case(unit, options.batch, common.DTYPES[dtype], timing.LAYOUTS[options.layout])
                refuse_stock(case, options)
                trained = timing.verify(what, case.results(), case.reference(), TOLERANCE[dtype])
                ours, eagers = case.inferred()
                inferred = timing.verify(f"{what} infer", [ours], [eagers], TOLERANCE[dtype])
                for passes in PASSES:
                    rows = measure(passes, case, dtype, inferred if passes == "infer" else trained, options)
                    for row in rows:
                        report.add(row, line(row))
                report.add(row := alone(case, dtype, float(str(rows[0]["copy_gb_per_s"]))), line(row))
            except (RuntimeError, SystemExit) as failure:  # out of memory, or a disagreement: the others still count
                report.add({"name": unit.name, "kind": unit.kind, "dtype": dtype, "failed": common.reason(failure)})
    return report.close(summarise(report.rows))


if __name__ == "__main__":
    sys.exit(main())
