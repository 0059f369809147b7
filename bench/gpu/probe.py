"""Which fused cuDNN graphs exist on this GPU for ResNet's convolutions, and what they cost against plain ones.

For each distinct convolution of ResNet-18 and -50 at batch 256, fp16 and bf16, the most frequent first: the times of
PyTorch's own forward, dgrad and wgrad, and for each pattern of gpu/patterns.py whether cuDNN builds and runs it, how
far its result is from PyTorch's, and its time. Without the Python package nvidia-cudnn-frontend every pattern is
recorded as not installed, and the exit status is 3.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import timing
import torch

from gpu import common
from gpu.clock import interleave
from gpu.common import Row
from gpu.convolutions import Conv, Operands, convolutions
from gpu.patterns import PATTERNS, Graph, UnsupportedError, frontend

ERROR_ALLOWED = 2e-2
SECONDS_OF_A_SHAPE = 3.0


def describe(conv: Conv, dtype: str, options: argparse.Namespace) -> Row:
    """The keys that every row of one convolution has."""
    height, width = conv.output_size
    shape = [options.batch, conv.inputs, conv.height, conv.width]
    weight = [conv.outputs, conv.inputs, conv.kernel, conv.kernel]
    return {
        "conv": str(conv), "count": conv.count, "shape": shape, "weight": weight, "stride": conv.stride,
        "padding": conv.padding, "output": [options.batch, conv.outputs, height, width], "dtype": dtype,
    }  # fmt: skip


def try_pattern(name: str, operands: Operands, cudnn: ModuleType, handle: Any) -> tuple[Callable[[], None] | None, Row]:
    """Builds and runs one pattern: what runs it, or None, and what to record."""
    builder, _, wide = PATTERNS[name]
    dtype = operands.x.dtype
    try:
        graph = Graph(cudnn, handle, dtype, torch.float32 if wide else dtype)
        output, expected = builder(graph, operands)
        run = graph.build()
        run()
        torch.cuda.synchronize()
    except (cudnn.cudnnGraphNotSupportedError, UnsupportedError) as error:
        return None, {"status": "not supported", "why": common.reason(error)}
    except Exception as error:  # the package reports bad graphs by errors of many types; each is an answer
        return None, {"status": "failed to build or run", "why": common.reason(error)}
    error_found = timing.relative_error(output, expected())
    found: Row = {"error": float(f"{error_found:.3g}")}
    if not error_found <= ERROR_ALLOWED:
        return None, found | {"status": "wrong result"}
    return run, found | {"status": "runs"}


def measure(conv: Conv, dtype: str, where: torch.device, options: argparse.Namespace, package: Any) -> list[Row]:
    """Rows of one convolution: plain passes, then patterns."""
    cudnn, handle, why = package
    operands = Operands(conv, options.batch, common.DTYPES[dtype], where)
    described = describe(conv, dtype, options)
    calls: dict[str, Callable[[], object]] = dict(operands.plain())
    answers: dict[str, Row] = {}
    for name in PATTERNS:
        if cudnn is None:
            answers[name] = {"status": why}
            continue
        run, answers[name] = try_pattern(name, operands, cudnn, handle)
        if run is not None:
            calls[name] = run
    result = interleave(calls, where, rounds=options.rounds, sample_seconds=options.sample, warmup=2)
    rows: list[Row] = []
    for name in operands.plain():
        seconds = result.time(name)
        tflops = conv.flops(options.batch) / seconds.median / 1e12
        row = {"name": name, **described, "status": "runs", "seconds": seconds.to_json()}
        rows.append(row | {"tflop_per_s": float(f"{tflops:.4g}")})
    for name, answer in answers.items():
        row = {"name": name, **described, **answer}
        if name in calls:
            row["seconds"] = result.time(name).to_json()
            row["over_plain"] = result.ratio(name, PATTERNS[name][1]).to_json()
        rows.append(row)
    return rows


def line(row: Row) -> str:
    """One result as a line of text."""
    text = f"{row['name']:<30}{row['conv']:<26}{row['dtype']:<5}"
    seconds, ratio = row.get("seconds"), row.get("over_plain")
    if isinstance(seconds, dict):
        text += f"{seconds['median'] * 1e6:9.1f} us"
    if isinstance(ratio, dict):
        text += f"  {ratio['median']:.3f} of plain"
    return (
        text if isinstance(seconds, dict) else f"{text}{row['status']}{': ' + str(row['why']) if 'why' in row else ''}"
    )


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each pattern and dtype: on how many convolutions it runs, and its least and largest multiple of the plain's
    time."""
    result: list[Row] = []
    for name, dtype in dict.fromkeys((row["name"], row.get("dtype")) for row in rows if row["name"] in PATTERNS):
        group = [row for row in rows if (row["name"], row.get("dtype")) == (name, dtype)]
        states = Counter(str(row["status"]) for row in group)
        over = [row["over_plain"]["median"] for row in group if isinstance(row.get("over_plain"), dict)]  # type: ignore[index]
        ratios = {"over_plain": [min(over), max(over)]} if over else {}
        result.append({"name": name, "dtype": dtype, "convolutions": len(group), **states, **ratios})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=40, dtypes=("fp16", "bf16"))
    parser.add_argument("--model", nargs="+", default=["resnet18", "resnet50"], help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=float, default=0.01, help="seconds of a sample (default: %(default)s)")
    options = parser.parse_args(arguments)
    where, deadline = common.device(options), common.Deadline(options.seconds)
    report = common.Report("probe", options, where)
    cudnn, why = frontend() if where.type == "cuda" else (None, frontend()[1] or "no GPU to build graphs for")
    handle = None
    if cudnn is not None:
        handle = cudnn.create_handle()
        print(f"cudnn frontend {cudnn.__version__}, cuDNN {cudnn.backend_version()}")
    else:
        print(f"probe: {why}: no fused cuDNN graph was tried; only plain convolutions are timed")
    for conv in sorted(convolutions(options.model, options.size), key=lambda c: -c.count):
        for dtype in options.dtype:
            skipped = deadline.skip(SECONDS_OF_A_SHAPE)
            if skipped:
                report.add({"name": "convolution", **describe(conv, dtype, options), "skipped": skipped})
                continue
            try:
                for row in measure(conv, dtype, where, options, (cudnn, handle, why)):
                    report.add(row, line(row))
            except RuntimeError as error:
                report.add({"name": "convolution", **describe(conv, dtype, options), "failed": common.reason(error)})
    summary = summarise(report.rows)
    if cudnn is None:
        summary.append({"name": "frontend", "status": why})
    # What there was no time for is no failure: the most frequent came first.
    if report.close(summary) == common.FAILED:
        return common.FAILED
    return common.ABSENT if cudnn is None else 0


if __name__ == "__main__":
    sys.exit(main())
