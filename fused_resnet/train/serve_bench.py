"""`fused-resnet serve-bench`: latency and throughput of a network that several threads call at once, ours and eager.

The threads of the machine are shared out: with as many callers as threads each computes alone. The two sides take turns
of a second, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import copy
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import _extension
from fused_resnet.inference import InferenceModule
from fused_resnet.inference.file import is_inference_file
from fused_resnet.nn import stock
from fused_resnet.timing import cpu_model
from fused_resnet.train import export, trained
from fused_resnet.train.errors import OptionError

_TURN_SECONDS = 1.0

# A call, and the context in which it is made.
_Side = tuple[Callable[[], object], Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True)
class Served:
    """One side with one number of callers; latencies are milliseconds of a call."""

    side: str
    callers: int
    threads: int
    calls: int
    p50_ms: float
    p99_ms: float
    images_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options to `parser`."""
    export.add_source(parser, checkpoint="a checkpoint, the folder of a run, or an exported file")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of a call (default: 1)")
    parser.add_argument("--size", type=int, metavar="N", help="side of the images (default: as trained, else 224)")
    parser.add_argument("--callers", default="1,2,4", metavar="N,N", help="threads that call at once (default: 1,2,4)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement (default: 5)")
    parser.add_argument("--dtype", choices=trained.DTYPES, help="to compute in (default: float32, or the file's own)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: what torch chose")
    parser.add_argument("--json", action="store_true", help="as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed options; returns the exit status."""
    callers = _numbers(arguments.callers)
    for name in ("batch", "size", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise OptionError(f"--{name} {getattr(arguments, name)}: must be greater than 0")
    if not 0 < arguments.seconds < 86400:
        raise OptionError(f"--seconds {arguments.seconds:g}: must be greater than 0, and less than a day")
    name, module, eager, size = _sides(arguments)
    x = _images(arguments, module, size)
    before = torch.get_num_threads()
    threads = arguments.threads or before
    calls: dict[str, _Side] = {"ours": (_ours(module, x), nullcontext)}
    if eager is not None:
        calls["eager"] = (_eager(eager, x, module.dtype), stock)
    try:
        rows = [row for count in callers for row in _serve(calls, count, threads, len(x), arguments.seconds)]
    finally:
        torch.set_num_threads(before)
    about = {
        "network": name, "batch": len(x), "size": list(x.shape[2:]), "dtype": str(module.dtype).removeprefix("torch."),
        "cpu": cpu_model(), "threads": threads, "kernels": _extension.build_info()["cpu_isa"],
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(_table(about, rows))
    return 0


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1024 for part in parts):
        raise OptionError(f"--callers {text}: must be whole numbers from 1 to 1024, such as 1,2,4")
    return [int(part) for part in parts]


def _sides(arguments: argparse.Namespace) -> tuple[str, InferenceModule, nn.Module | None, int]:
    """Name, our side, the eager one where there is one, and the side of the images it was trained with."""
    path = arguments.checkpoint
    if path is not None and is_inference_file(path):
        if arguments.dtype is not None or arguments.weights is not None or arguments.classes is not None:
            raise OptionError("--dtype, --weights, --classes: an exported file has its own")
        module = trained.of_file(path)
        extent = module.graph.extent
        how = module.metadata.get("preprocess")
        size = how.get("size") if isinstance(how, dict) else None
        return str(path), module, None, extent[0] if extent else size if isinstance(size, int) else 224
    source = export.source_of(arguments)
    module = source.optimized(trained.DTYPES[arguments.dtype or "float32"])
    default = 32 if source.name.startswith("cifar.") else 224
    return source.name, module, source.model, source.about.get("preprocess", {}).get("size", default)


def _images(arguments: argparse.Namespace, module: InferenceModule, size: int) -> Tensor:
    graph = module.graph
    side = arguments.size or size
    extent = (side, side) if arguments.size else graph.extent or (side, side)
    try:
        x = torch.randn(arguments.batch, graph.channels, *extent).to(module.dtype, memory_format=torch.channels_last)
        module(x)
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"--batch {arguments.batch} --size {side}: {str(error).splitlines()[0]}") from None
    return x


def _ours(module: InferenceModule, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    model = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def _serve(calls: dict[str, _Side], callers: int, threads: int, batch: int, seconds: float) -> list[Served]:
    """Both sides in turns, until each has had its time."""
    each = max(1, threads // callers)
    turns = max(1, round(seconds / _TURN_SECONDS))
    latencies: dict[str, list[float]] = {side: [] for side in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(turns):
        for side, (call, context) in calls.items():
            with context():
                took, elapsed = _turn(call, callers, each, seconds / turns)
            latencies[side] += took
            spent[side] += elapsed
    return [
        Served(
            side=side,
            callers=callers,
            threads=each,
            calls=len(took),
            p50_ms=round(1e3 * _quantile(took, 0.50), 3),
            p99_ms=round(1e3 * _quantile(took, 0.99), 3),
            images_per_s=round(batch * len(took) / spent[side], 2),
        )
        for side, took in latencies.items()
    ]


def _turn(call: Callable[[], object], callers: int, threads: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of all calls that the callers made in that time, and the time from the first to the last."""
    ready = threading.Barrier(callers)

    def caller() -> tuple[list[float], float, float]:
        torch.set_num_threads(threads)  # of the calling thread
        try:
            call()
        except BaseException:
            ready.abort()  # the others would wait for ever
            raise
        ready.wait()
        took: list[float] = []
        first = last = time.perf_counter()
        while not took or last < first + seconds:
            start = last
            call()
            last = time.perf_counter()
            took.append(last - start)
        return took, first, last

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(caller) for _ in range(callers)]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    results = [future.result() for future in futures]
    elapsed = max(last for _, _, last in results) - min(first for _, first, _ in results)
    return [latency for took, _, _ in results for latency in took], elapsed


def _quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that is not below this share of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _table(about: dict[str, Any], rows: Sequence[Served]) -> str:
    height, width = about["size"]
    kernels = about["kernels"] or "PyTorch's"
    lines = [
        f"{about['network']}, batch {about['batch']}, {height}x{width}, {about['dtype']}",
        f"{about['cpu']}, {about['threads']} threads, kernels {kernels}",
        "",
        f"{'callers':>7} {'threads each':>12}  {'side':<6}{'calls':>7}{'p50 ms':>10}{'p99 ms':>10}{'images/s':>11}"
        "  ours",
    ]
    ours = {row.callers: row.images_per_s for row in rows if row.side == "ours"}
    for row in rows:
        faster = f"  {ours[row.callers] / row.images_per_s:.2f}x" if row.side != "ours" else ""
        lines.append(
            f"{row.callers:>7} {row.threads:>12}  {row.side:<6}{row.calls:>7}{row.p50_ms:>10.2f}{row.p99_ms:>10.2f}"
            f"{row.images_per_s:>11.1f}{faster}"
        )
    return "\n".join(lines)
