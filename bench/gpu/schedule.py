"""Settings in the time that there is: those that can be timed with all contestants first, then the others without
torch.compile, which say so. A failure is a row, a batch that does not fit is halved."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from models import Setting

from fused_resnet import testing
from gpu import common
from gpu.common import Row

SMALLEST_BATCH = 8


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        measure: verifies and times one setting with these contestants.
        line: a row as a line of text.
        where: the device.
        seconds: about how long a setting takes without torch.compile.
        to_compile: seconds that torch.compile takes, by model, where nothing is known yet.
        graphs: whether steps are CUDA graphs, for rows of what was not timed.
        plain_first: time everything without torch.compile before anything is compiled, so that compiling which never
            ends costs no row. Otherwise the first settings are timed once, with all contestants.
    """

    measure: Callable[[Setting, Sequence[str]], Row]
    line: Callable[[Row], str]
    where: torch.device
    seconds: float
    to_compile: Mapping[str, float]
    graphs: bool = False
    plain_first: bool = False


def with_times(row: Row, result: testing.Comparison) -> Row:
    """`row` with each contestant's time and speed, and how many times as fast ours is."""
    times: Row = {}
    for side in result.seconds:
        if side != "fused":
            key = "speedup" if side == "eager" else f"speedup_over_{side}"
            times[key] = result.ratio(side, "fused").to_json()
    for side in result.seconds:
        spread = result.time(side)
        times[f"{side}_seconds"] = spread.to_json()
        times[f"{side}_images_per_s"] = round(int(str(row["batch"])) / spread.median, 1)
    return row | times


def clean(where: torch.device) -> None:
    """Gives back what a setting held."""
    torch._dynamo.reset()
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()


def _described(setting: Setting, sides: Sequence[str], work: Work) -> Row:
    return {
        "name": setting.model, "batch": setting.batch, "dtype": setting.dtype, "graphs": work.graphs,
        "sides": list(sides),
    }  # fmt: skip


def attempt(setting: Setting, sides: Sequence[str], work: Work) -> tuple[Row, str]:
    """One setting, or its failure, as a row, and the line that says so."""
    while True:
        described = _described(setting, sides, work)
        try:
            row = work.measure(setting, sides)
            return row, work.line(row)
        except torch.OutOfMemoryError as error:
            described["failed"] = common.reason(error)
            halve = setting.batch > SMALLEST_BATCH
        except (Exception, SystemExit) as error:  # whatever one contestant died of, the other settings still count
            described["failed"] = common.reason(error)
            halve = False
        if not halve:
            return described, f"{setting} {'/'.join(sides)}: {described['failed']}"
        print(f"{setting}: out of memory, trying half the batch", flush=True)
        setting = replace(setting, batch=setting.batch // 2)
        clean(work.where)


def run(
    settings: Sequence[Setting], sides: Sequence[str], work: Work, deadline: common.Deadline, report: common.Report
) -> None:
    """All settings: first those for which there is time with all contestants, then the others without torch.compile."""
    if work.plain_first and "compile" in sides:
        _run_plain_first(settings, sides, work, deadline, report)
        return
    to_compile = dict(work.to_compile)
    later: list[tuple[Setting, str]] = []
    for setting in settings:
        need = work.seconds + (to_compile.get(setting.model, 0.0) if "compile" in sides else 0.0)
        if skipped := deadline.skip(need):
            later.append((setting, skipped))
            continue
        began = time.monotonic()
        report.add(*attempt(setting, sides, work))
        clean(work.where)
        # How long it takes here is known now.
        to_compile[setting.model] = max(time.monotonic() - began - work.seconds, 0.0)
    plain = [side for side in sides if side != "compile"]
    for setting, why in later:
        if plain == list(sides) or deadline.skip(work.seconds):
            described = _described(setting, sides, work)
            report.add(described | {"skipped": why}, f"{setting} {'/'.join(sides)}: {why}")
            continue
        row, text = attempt(setting, plain, work)
        skipped = f"torch.compile: {why}"
        report.add(row | {"skipped": skipped}, f"{text}  skipped: {skipped}")
        clean(work.where)


def _run_plain_first(
    settings: Sequence[Setting], sides: Sequence[str], work: Work, deadline: common.Deadline, report: common.Report
) -> None:
    plain = [side for side in sides if side != "compile"]
    places: dict[int, Setting] = {}
    for setting in settings:
        if skipped := deadline.skip(work.seconds):
            report.add(
                _described(setting, sides, work) | {"skipped": skipped}, f"{setting} {'/'.join(sides)}: {skipped}"
            )
            continue
        row, text = attempt(setting, plain, work)
        if "failed" not in row:
            places[len(report.rows)] = replace(setting, batch=int(str(row["batch"])))  # the batch that fits
            row["skipped"] = "torch.compile: not begun"  # what the file says if this step is cut off
        report.add(row, text)
        clean(work.where)
    to_compile = dict(work.to_compile)
    for place, setting in places.items():
        former = report.rows[place]
        if why := deadline.skip(work.seconds + to_compile.get(setting.model, 0.0)):
            skipped = f"torch.compile: {why}"
            report.replace(place, former | {"skipped": skipped}, f"{setting} compile: {skipped}")
            continue
        began = time.monotonic()
        row, text = attempt(setting, sides, work)
        if "failed" not in row and row["batch"] != setting.batch:
            row = {"failed": f"out of memory at batch {setting.batch}, fits at {row['batch']}"}
        if "failed" in row:  # without torch.compile it has been timed
            row = {key: value for key, value in former.items() if key != "skipped"} | {"failed": row["failed"]}
        report.replace(place, row, text)
        clean(work.where)
        to_compile[setting.model] = max(time.monotonic() - began - work.seconds, 0.0)
