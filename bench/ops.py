"""Times the fused batch-norm operators over a model's shapes, against eager PyTorch.

    python bench/ops.py                        both dtypes, ResNet-50's shapes, batch 16
    python bench/ops.py --quick --kind bn_act  a first look at one kind

Every shape is verified, then timed in turn: eager, fused, a plain copy of x (and torch.compile if asked). Two figures
come out: how much faster than eager, and the bytes a unit must at least move over its time as a fraction of what the
copy reached in the same rounds.

Memory: "fresh" is what a user gets. Outputs are new tensors at every call, and where the C library hands out unmapped
pages, the first touch is part of the time, on both sides alike. "resident" keeps freed memory mapped, on both sides
alike, and so compares the kernels alone. The copy's destination is resident in both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import timing
import torch
from units import KINDS, Case, Unit, load_units

import fused_resnet as fr
from fused_resnet import testing

Row = dict[str, object]

# Of fused against eager in fp32 on the same numbers, relative to the norm of the whole result: rounding errors of the
# dtype, and elements that rounding moves to the other side of the relu. Of millions one does, and in a gradient of k
# active elements it alone is an error of 1/sqrt(k), 5e-4 for 4 millions.
TOLERANCE = {"fp32": 2e-3, "bf16": 1e-2}
COPY = "copy"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=("resnet18", "resnet50"), help="whose shapes")
    parser.add_argument("--batch", type=timing.positive, default=16, help="default: %(default)s")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="default: all that the model has, and add_act")
    parser.add_argument("--passes", choices=("train", "forward", "backward", "infer"), default="train")
    parser.add_argument("--pages", choices=("fresh", "resident", "both"), default="both")
    parser.add_argument("--cache-mb", type=timing.positive, help="last-level cache share (default: the whole cache)")
    parser.add_argument("--max-size", type=timing.positive, help="shrink images to at most this height and width")
    timing.add_common_options(parser, rounds=15)
    options = parser.parse_args(arguments)
    if options.dry:
        options.max_size = min(options.max_size or 8, 8)
        options.batch = min(options.batch, 2)
    return options


def selected_units(options: argparse.Namespace) -> list[Unit]:
    """The units to time. add_act borrows the shapes of bn_add_act, with a count of 0: it is not part of the sums."""
    units = load_units(options.model)
    units += [
        replace(unit, kind="add_act", count=0, name=f"{unit.name}.add") for unit in units if unit.kind == "bn_add_act"
    ]
    if options.kind:
        units = [unit for unit in units if unit.kind in options.kind]
    if options.max_size:
        size = options.max_size
        units = [replace(unit, height=min(unit.height, size), width=min(unit.width, size)) for unit in units]
    if not units:
        raise SystemExit(f"{options.model} has no unit of kind {', '.join(options.kind)}")
    return units


def refuse_stock(case: Case, options: argparse.Namespace) -> None:
    """Exits when the operator runs PyTorch's own batch norm, unless that is allowed."""
    if options.allow_stock:
        return
    if not fr.is_available():
        raise SystemExit(f"nothing fused to time: {fr.build_info()['why_unavailable']} (--allow-stock times it anyway)")
    calls = testing.count_batch_norms(case.call("forward", case.kind.fused))
    if case.kind.norm and (calls.stock or not calls.fused):
        raise SystemExit(f"{case.unit.kind} {tuple(case.x.shape)} runs stock (--allow-stock times it anyway)")


def contestants(case: Case, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is timed against each other."""
    destination = torch.empty_like(case.x).detach()
    source = case.x.detach()
    calls: dict[str, Callable[[], object]] = {
        "eager": case.call(options.passes, case.kind.eager),
        "fused": case.call(options.passes, case.kind.fused),
        COPY: lambda: destination.copy_(source),
    }
    if options.compile:
        torch._dynamo.reset()
        calls["compile"] = case.call(options.passes, torch.compile(case.kind.eager))
    return calls


def measure(
    unit: Unit, dtype: str, layout: str, pages: str, options: argparse.Namespace, progress: timing.Progress
) -> Row | None:
    """Verifies and times one unit; None on a dry run."""
    what = f"{unit.kind} {unit.channels}x{unit.height}x{unit.width} {dtype} {layout}"
    progress.begin(what)
    case = Case(unit, options.batch, timing.DTYPES[dtype], timing.LAYOUTS[layout])
    refuse_stock(case, options)
    error = timing.verify(what, case.results(), case.reference(), TOLERANCE[dtype])
    calls = contestants(case, options)
    if options.dry:
        for call in calls.values():
            call()
        progress.advance(options.rounds)
        return None
    comparison = testing.interleave(
        calls, rounds=options.rounds, clock=timing.CLOCKS[options.clock], on_round=progress.advance
    )
    cache = options.cache_mb * 2**20 if options.cache_mb else testing.last_level_cache_bytes() or 0
    minimum = case.minimum_bytes(options.passes)
    # bandwidth over the copy's: (minimum / fused) / (2 * tensor / copy), round by round
    copy_scale = minimum / (2 * case.tensor_bytes())
    fraction = testing.Spread.of(
        [c / f * copy_scale for c, f in zip(comparison.seconds[COPY], comparison.seconds["fused"], strict=True)]
    )
    row: Row = {
        "name": unit.name, "kind": unit.kind, "count": unit.count,
        "shape": list(case.x.shape), "dtype": dtype, "layout": layout, "pages": pages, "passes": options.passes,
        "tensor_bytes": case.tensor_bytes(), "beyond_cache": case.tensor_bytes() > cache,
        "minimum_bytes": minimum, "eager_bytes": case.kind.eager_passes * case.tensor_bytes(),
        "error": float(f"{error:.3g}"),
        "speedup": comparison.ratio("eager", "fused").to_json(),
        "copy_fraction": fraction.to_json(),
        "gb_per_s": round(minimum / comparison.time("fused").median / 1e9, 3),
        "copy_gb_per_s": round(2 * case.tensor_bytes() / comparison.time(COPY).median / 1e9, 3),
    }  # fmt: skip
    if options.compile:
        row["speedup_over_compile"] = comparison.ratio("compile", "fused").to_json()
    for name in calls:
        row[f"{name}_seconds"] = comparison.time(name).to_json()
        row[f"{name}_page_faults"] = comparison.page_faults(name)
    progress.say(row_line(row))
    return row


def median(row: Row, key: str) -> float:
    """Median of one of a row's spreads."""
    spread = row[key]
    assert isinstance(spread, dict)
    return float(spread["median"])


def row_line(row: Row) -> str:
    """One result as a line of text."""
    shape = "x".join(str(n) for n in row["shape"])  # type: ignore[attr-defined]
    mark = " " if row["beyond_cache"] else "c"
    return (
        f"{row['kind']:<12}{shape:<16}{row['dtype']:<5}{row['layout']:<14}{row['pages']:<9}"
        f"eager {median(row, 'eager_seconds') * 1e3:8.2f} ms  fused {median(row, 'fused_seconds') * 1e3:8.2f} ms  "
        f"{median(row, 'speedup'):5.2f}x  {median(row, 'copy_fraction'):4.0%} of copy {mark}"
    )


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Weighted figures for each dtype, layout and memory mode.

    The ratio is that of the model's sums, time x count, with each eager time taken as fused time x median ratio. The
    fraction of the copy counts only tensors larger than the cache.
    """
    result: list[Row] = []
    groups = dict.fromkeys((row["dtype"], row["layout"], row["pages"]) for row in rows)
    for dtype, layout, pages in groups:
        group = [r for r in rows if (r["dtype"], r["layout"], r["pages"]) == (dtype, layout, pages)]
        for label, kinds in (
            ("bn+relu and bn+add+relu", ("bn_act", "bn_add_act")),
            ("all units", tuple(kind for kind in KINDS if kind != "add_act")),
            *((kind, (kind,)) for kind in KINDS),
        ):
            chosen = [row for row in group if row["kind"] in kinds]
            if not chosen:
                continue
            weights = [float(max(int(str(row["count"])), label == "add_act")) for row in chosen]
            times = [w * median(row, "fused_seconds") for w, row in zip(weights, chosen, strict=True)]
            summary: Row = {"name": label, "dtype": dtype, "layout": layout, "pages": pages}
            for key in ("speedup", "speedup_over_compile"):
                if key in chosen[0]:
                    ratios = [median(row, key) for row in chosen]
                    summary[key] = round(sum(t * r for t, r in zip(times, ratios, strict=True)) / sum(times), 4)
            large = [(t, row) for t, row in zip(times, chosen, strict=True) if row["beyond_cache"]]
            if large:
                total = sum(t for t, _ in large)
                summary["copy_fraction"] = round(sum(t * median(row, "copy_fraction") for t, row in large) / total, 4)
                summary["copy_fraction_worst"] = round(min(median(row, "copy_fraction") for _, row in large), 4)
            result.append(summary)
    return result


def print_summary(summary: Sequence[Row]) -> None:
    """The weighted figures as a table."""
    print(f"\n{'weighted by count':<26}{'dtype':<6}{'layout':<15}{'memory':<10}{'faster':>8}{'of copy':>9}{'worst':>7}")
    for row in summary:
        fraction = f"{row['copy_fraction']:>9.0%}{row['copy_fraction_worst']:>7.0%}" if "copy_fraction" in row else ""
        print(
            f"{row['name']:<26}{row['dtype']:<6}{row['layout']:<15}{row['pages']:<10}{row['speedup']:>7.2f}x{fraction}"
        )


def run_here(pages: str, options: argparse.Namespace) -> list[Row]:
    """All units in this process, with one memory mode."""
    if pages == "resident" and not timing.keep_freed_memory():
        print("resident memory: this C library has no mallopt; skipped", file=sys.stderr)
        return []
    timing.apply_common_options(options)
    units = selected_units(options)
    runs = [(unit, dtype, layout) for dtype in options.dtype for layout in options.layout for unit in units]
    progress = timing.Progress(len(runs) * options.rounds)
    rows = [measure(unit, dtype, layout, pages, options, progress) for unit, dtype, layout in runs]
    progress.close()
    return [row for row in rows if row is not None]


def run_in_process(pages: str, arguments: Sequence[str]) -> list[Row]:
    """The same in a process of its own: the memory mode is a property of the process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *arguments, "--pages", pages, "--output", str(output)]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(1)
        return list(json.loads(output.read_text(encoding="utf-8"))["rows"]) if output.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.pages == "both":
        rows = [row for pages in ("fresh", "resident") for row in run_in_process(pages, arguments)]
        timing.apply_common_options(options)
    else:
        rows = run_here(options.pages, options)
    if options.dry:
        if options.pages != "both":
            print(f"dry run, {options.pages} memory: everything agreed, nothing timed")
        return
    result = timing.document("ops", options, rows, summarise(rows))
    if options.pages == "both" or options.output is None:
        print_summary(summarise(rows))
    path = timing.write(result, options.output, f"ops-{options.model}-{options.passes}")
    if options.output is None:
        print(f"\nwritten: {timing.show(path)}")


if __name__ == "__main__":
    main()
