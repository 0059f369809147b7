"""What the benchmark scripts share: options, memory modes, verification, progress, and the JSON they write.

The clock itself is `fused_resnet.testing.interleave`, which the command `fused-resnet bench` uses too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.autograd import profiler_legacy

from fused_resnet import testing

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SCHEMA = 1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# Keys every result file has, with the type of each.
_DOCUMENT: dict[str, type] = {
    "schema": int, "benchmark": str, "created": str, "commit": str, "machine": dict, "options": dict, "rows": list,
    "summary": list,
}  # fmt: skip
_SPREAD = ("median", "q1", "q3", "low", "high")


def add_common_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Options that all timing scripts have."""
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both")
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, default=["channels_last"], help="default: channels_last"
    )
    parser.add_argument("--threads", type=positive, help="default: what torch chose")
    parser.add_argument("--rounds", type=positive, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: CPU time, for a busy machine; --threads 1"
    )
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the stock code")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a first look, not a result")
    parser.add_argument("--dry", action="store_true", help="verify and run all once, time nothing, write nothing")
    parser.add_argument("--allow-stock", action="store_true", help="time even what does not run fused")
    parser.add_argument("--output", type=Path, help="JSON to write (default: bench/results/<cpu>-<isa>/<name>.json)")


def apply_common_options(options: argparse.Namespace) -> None:
    """Sets threads and the number of rounds that the options imply."""
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        raise SystemExit("--clock cpu: expected --threads 1: waiting threads use CPU time too")
    if options.quick:
        options.rounds = min(options.rounds, 3)
    if options.dry:
        options.rounds = 1


def positive(text: str) -> int:
    """An argument that must be a whole number above zero."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the system.

    By default it maps every large tensor afresh and the first touch of each page costs several times the pass that
    fills it. That is what users get, and what the mode "fresh" times. The mode "resident" calls this first, in a
    process of its own, so that both contestants work on pages that are already there: it compares the kernels alone.

    Returns:
        False where the C library has no such switch.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, -1))


def huge_page_environment() -> dict[str, str] | None:
    """Environment of a process whose malloc asks for huge pages, as the package's pool does; None: this one's does.

    glibc reads the setting when a process starts.
    """
    name, setting = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
    before = os.environ.get(name, "")
    if setting in before.split(":"):
        return None
    return {**os.environ, name: f"{before}:{setting}".lstrip(":")}


def events(call: Callable[[], object]) -> list[str]:
    """Runs `call` once and names every operator that it executed, such as "aten::convolution"."""
    # The old profiler, because torch.profiler logs two lines to standard error at every use.
    with profiler_legacy.profile() as profile:
        call()
    return [event.name for event in profile.function_events or ()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over the norm of `expected`."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def verify(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """The largest relative error over pairs of tensors; exits if it is above `tolerance` or not a number."""
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    worst = next((error for error in errors if math.isnan(error)), max(errors))
    if not worst <= tolerance:
        raise SystemExit(f"{what}: fused and stock disagree: relative error {worst:.2e}, allowed {tolerance:.0e}")
    return worst


def slug(name: str) -> str:
    """A processor's name as a folder name."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|\bprocessor\b|\d+-core", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"


def commit() -> str:
    """Commit of this checkout, with "+changes" if the tree differs from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def document(
    benchmark: str,
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, object]],
    summary: Sequence[object],
    **more: object,
) -> dict[str, object]:
    """The JSON object of one run, checked; `more` are keys that only this benchmark has."""
    result: dict[str, object] = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": testing.machine(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "rows": list(rows),
        "summary": list(summary),
        **more,
    }
    check(result)
    return result


def check(result: object) -> None:
    """Raises ValueError unless `result` has the form that `document` makes."""
    if not isinstance(result, dict):
        raise ValueError(f"result: expected an object, got {type(result).__name__}")
    for key, kind in _DOCUMENT.items():
        if not isinstance(result.get(key), kind):
            raise ValueError(f"result: {key}: expected {kind.__name__}, got {result.get(key)!r}")
    if result["schema"] != SCHEMA:
        raise ValueError(f"result: schema: expected {SCHEMA}, got {result['schema']}")
    for index, row in enumerate([*result["rows"], *result["summary"]]):
        if not isinstance(row, dict) or "name" not in row:
            raise ValueError(f"result: row {index}: expected an object with a name, got {row!r}")
        for key, value in row.items():
            if isinstance(value, dict) and "median" in value and not all(value.get(part, -1) >= 0 for part in _SPREAD):
                raise ValueError(f"result: row {index}: {key}: expected {_SPREAD}, all >= 0, got {value}")


def write(result: Mapping[str, object], output: Path | None, name: str) -> Path:
    """Writes one result file and returns its path."""
    machine = result["machine"]
    assert isinstance(machine, dict)
    # Machines of one name differ in what they let their guests see.
    isa = str(machine["build"]["cpu_isa"] or "stock").replace("_", "-")
    path = output or RESULTS / f"{slug(str(machine['cpu']))}-{isa}" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def show(path: Path) -> str:
    """`path` relative to the working folder when it lies in it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class Progress:
    """One line on a terminal: how far, what now, how long still. Silent when standard error is no terminal."""

    WIDTH = 24

    def __init__(self, total: int) -> None:
        self._total, self._done, self._what = max(total, 1), 0, ""
        self._stream: TextIO = sys.stderr
        self._start = time.monotonic()
        self._live = self._stream.isatty()

    def begin(self, what: str) -> None:
        """Names what runs now."""
        self._what = what
        self._draw()

    def advance(self, steps: int = 1) -> None:
        """Counts finished steps."""
        self._done = min(self._done + steps, self._total)
        self._draw()

    def say(self, line: str) -> None:
        """Prints a line of results above the bar."""
        self._clear()
        print(line, flush=True)
        self._draw()

    def close(self) -> None:
        """Removes the bar."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _draw(self) -> None:
        if not self._live:
            return
        share = self._done / self._total
        filled = round(share * self.WIDTH)
        left = (time.monotonic() - self._start) * (1 - share) / share if share else 0.0
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left" if share else "--:-- left"
        bar = "#" * filled + "." * (self.WIDTH - filled)
        self._stream.write(f"\r\033[K[{bar}] {share:4.0%} {clock}  {self._what}"[:110])
        self._stream.flush()
