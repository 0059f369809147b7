"""What the GPU scripts share: options, the device, a deadline, and a JSON file that is complete after every row."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import timing
import torch

Row = dict[str, object]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Exit statuses: something failed; what was to be examined is not installed; something was left out.
FAILED, ABSENT, INCOMPLETE = 1, 3, 4


def parser(
    description: str | None, *, seconds: float, dtypes: Sequence[str] = ("bf16", "fp16")
) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, help="folder for the JSON (default: bench/results/<gpu name>)")
    result.add_argument("--seconds", type=float, default=seconds, help="begin nothing new after (default: %(default)s)")
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(dtypes), help="default: %(default)s")
    result.add_argument("--device", default="cuda", help="cpu only tries the script out: its figures mean nothing")
    return result


def device(options: argparse.Namespace) -> torch.device:
    """The device to measure; exits with one line when there is none."""
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    where = torch.device(options.device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # events, streams and graphs are the current device's
    return where


def synchronize(where: torch.device) -> None:
    """Waits for the device."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def describe(where: torch.device) -> dict[str, object]:
    """What a reader needs to judge a GPU's numbers."""
    if where.type != "cuda":
        return {"name": where.type}
    properties = torch.cuda.get_device_properties(where)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": cache_bytes(where),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": _nvidia_smi(),
    }


def cache_bytes(where: torch.device) -> int:
    """Size of the level-2 cache; 0 where torch does not tell."""
    if where.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(where), "L2_cache_size", 0))


def _nvidia_smi() -> str | None:
    """Driver, power limit and clocks of every GPU, as nvidia-smi prints them; None without it."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Deadline:
    """A time after which nothing new begins."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain."""
        return self._end - time.monotonic()

    def skip(self, need: float) -> str | None:
        """Says why something that takes about `need` seconds does not begin; None: there is time."""
        return None if self.left() >= need else f"no time left: {max(self.left(), 0.0):.0f} s, needs about {need:.0f} s"


class Report:
    """Rows of one benchmark. The file is written anew after each, so that a run cut short loses nothing."""

    def __init__(self, benchmark: str, options: argparse.Namespace, where: torch.device) -> None:
        self._document = timing.document(benchmark, options, [], [])
        machine = self._document["machine"]
        assert isinstance(machine, dict)
        machine["gpu"] = describe(where)
        gpu = machine["gpu"]
        folder = options.out or timing.RESULTS / timing.slug(str(gpu["name"]))
        self.path: Path = folder / f"{benchmark}.json"
        self.rows: list[Row] = []
        self.failed = self.incomplete = False

    def add(self, row: Row, line: str | None = None) -> None:
        """Adds one row, prints its line, writes the file.

        A row with the key "failed" makes the run a failure, one with the key "skipped" makes it incomplete.
        """
        self.failed = self.failed or "failed" in row
        self.incomplete = self.incomplete or "skipped" in row
        self.rows.append(row)
        text = line or f"{row['name']}: {row.get('failed') or row.get('skipped') or row.get('status') or 'done'}"
        print(text, flush=True)
        self.write([])

    def replace(self, place: int, row: Row, line: str) -> None:
        """Puts a row in the place of one that said less."""
        self.rows[place] = row
        self.failed = self.failed or "failed" in row
        self.incomplete = any("skipped" in other for other in self.rows)
        print(line, flush=True)
        self.write([])

    def write(self, summary: Sequence[Row]) -> None:
        """Writes what there is."""
        self._document["rows"], self._document["summary"] = self.rows, list(summary)
        timing.check(self._document)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")  # a kill in the middle leaves the former file whole
        temporary.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def close(self, summary: Sequence[Row] = ()) -> int:
        """Writes the file for good and returns the exit status."""
        self.write(summary)
        print(f"written: {timing.show(self.path)}", flush=True)
        return FAILED if self.failed else INCOMPLETE if self.incomplete else 0


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:300]
