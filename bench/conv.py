"""Times this package's convolutions over a model's shapes, against ATen's (oneDNN), in channels_last.

    python bench/conv.py                                     ResNet-50, both dtypes, batch 16, every pass
    python bench/conv.py --quick --only layer1.0.conv2       a first look at one convolution
    python bench/conv.py --clock cpu --threads 1             on a busy machine
    python bench/conv.py --blocks --model resnet18           whole residual blocks, forward and backward

Every convolution is verified, ours against ATen and both against fp64, then ours and ATen take turns. The plain passes
are the convolution alone, the fused ones include the batch norms and relu around it: bench/conv_cases.py says what each
side does. Outputs come from memory that stays mapped on both sides, in huge pages where the system has them; the page
faults of a call are in the results. What would run ATen's convolution on our side is refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import ceilings
import conv_blocks
import timing
import torch
from ceilings import Ceiling
from conv_cases import MODELS, PASSES, Case, Convolution, Pass, is_stock, load

import fused_resnet as fr
from fused_resnet import testing

Row = dict[str, object]

BATCH, CIFAR_BATCH = 16, 128
# Of both sides against fp64 and of ours against ATen, relative to the norm of the whole result. A gradient also changes
# where rounding moves an element to the other side of the relu: of k active elements one alone is 1/sqrt(k).
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
TOGETHER = {
    "convolutions alone": ("forward", "data", "weight"),
    "with batch norm and relu": ("forward fused", "data fused", "weight fused"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=MODELS, help="whose shapes (default: %(default)s)")
    parser.add_argument("--batch", type=timing.positive, help=f"default: {BATCH}; CIFAR models {CIFAR_BATCH}")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help=str(PASSES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these convolutions or blocks")
    parser.add_argument("--blocks", action="store_true", help="whole residual blocks instead of convolutions")
    parser.add_argument("--pages", choices=("fresh", "resident"), default="resident", help="see bench/README.md")
    parser.add_argument("--max-size", type=timing.positive, help="shrink images to at most this height and width")
    timing.add_common_options(parser, rounds=15)
    options = parser.parse_args(arguments)
    if options.layout != ["channels_last"]:
        parser.error("--layout: the convolutions are channels_last only")
    if options.compile:
        parser.error("--compile: bench/models.py has it")
    options.batch = options.batch or (CIFAR_BATCH if options.model.startswith("cifar.") else BATCH)
    if options.dry:
        options.max_size = min(options.max_size or 8, 8)
        options.batch = min(options.batch, 2)
    return options


def selected(options: argparse.Namespace) -> list[Convolution]:
    """The convolutions to time."""
    found = load(options.model)
    known = [conv.name for conv in found]
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        raise SystemExit(f"{options.model} has no convolution {', '.join(unknown)}, only {', '.join(known)}")
    size = options.max_size or max(max(conv.height, conv.width) for conv in found)
    return [
        Convolution(**{**vars(conv), "height": min(conv.height, size), "width": min(conv.width, size)})
        for conv in found
        if not options.only or conv.name in options.only
    ]


def refuse_stock(what: str, timed: Pass) -> None:
    """Exits when our side runs one of ATen's convolutions or batch norms, or nothing of ours."""
    names = timing.events(timed.own)
    stock = sorted({name for name in names if is_stock(name)})
    if stock or not any(name.startswith("fused_resnet::") for name in names):
        raise SystemExit(f"{what}: our side runs {', '.join(stock) or 'no operator of ours'}: not timed")


def verify(what: str, timed: Pass, dtype: str) -> tuple[float, float, float]:
    """Relative errors: ours to fp64, ATen's to fp64, ours to ATen's; exits if one is too large."""
    own, aten, exact = timed.own(), timed.aten(), timed.reference()
    tolerance, common = TOLERANCE[dtype], len(aten)
    return (
        timing.verify(f"{what}, ours and fp64", own, exact, tolerance),
        timing.verify(f"{what}, ATen and fp64", aten, exact[:common], tolerance),
        timing.verify(f"{what}, ours and ATen", own[:common], aten, tolerance),
    )


def measure(conv: Convolution, dtype: str, options: argparse.Namespace, progress: timing.Progress) -> list[Row]:
    """Verifies and times the passes of one convolution; nothing comes back from a dry run."""
    case = Case(conv, options.batch, timing.DTYPES[dtype])
    passes = [name for name in options.passes if name in conv.passes()]
    errors, slow = {}, {}
    for name in passes:
        what = f"{conv.name} {conv} {dtype} {name}"
        progress.begin(what)
        timed = case.pass_(name)
        refuse_stock(what, timed)
        errors[name] = verify(what, timed, dtype)
        slow[name] = any("slow_conv" in operator for operator in timing.events(timed.aten))
    case.forget_reference()
    rows = []
    cache = testing.last_level_cache_bytes() or 0
    for name in passes:
        if options.dry:
            progress.advance(options.rounds)
            continue
        progress.begin(f"{conv.name} {conv} {dtype} {name}")
        timed = case.pass_(name)
        comparison = testing.interleave(
            {"aten": timed.aten, "own": timed.own}, rounds=options.rounds, clock=timing.CLOCKS[options.clock],
            on_round=progress.advance,
        )  # fmt: skip
        row: Row = {
            "name": conv.name, "pass": name, "count": conv.count, "dtype": dtype, "layout": "channels_last",
            "batch": options.batch, "convolution": vars(conv) | {"text": str(conv)}, "plan": case.plan(name),
            "aten_runs": "slow_conv2d" if slow[name] else "oneDNN",
            "flops": case.flops(), "minimum_bytes": timed.minimum_bytes,
            "intensity": round(case.flops() / timed.minimum_bytes, 3), "beyond_cache": case.tensor_bytes() > cache,
            "error": {
                key: float(f"{e:.3g}") for key, e in zip(("own", "aten", "between"), errors[name], strict=True)
            },
            "speedup": comparison.ratio("aten", "own").to_json(),
        }  # fmt: skip
        for side in ("own", "aten"):
            seconds = comparison.time(side)
            row[f"{side}_seconds"] = seconds.to_json()
            row[f"{side}_gflop_per_s"] = round(case.flops() / seconds.median / 1e9, 2)
            row[f"{side}_gb_per_s"] = round(timed.minimum_bytes / seconds.median / 1e9, 2)
            row[f"{side}_page_faults"] = comparison.page_faults(side)
        rows.append(row)
        progress.say(row_line(row))
    return rows


def median(row: Row, key: str) -> float:
    """Median of one of a row's spreads."""
    spread = row[key]
    assert isinstance(spread, dict)
    return float(spread["median"])


def number(row: Row, key: str) -> float:
    """One of a row's plain numbers."""
    return float(str(row[key]))


def row_line(row: Row) -> str:
    """One result as a line of text."""
    speedup, conv, error = row["speedup"], row["convolution"], row["error"]
    assert isinstance(speedup, dict)
    assert isinstance(conv, dict)
    assert isinstance(error, dict)
    return (
        f"{conv['text']:<24}{conv['role']:<9}{row['dtype']:<5}{row['pass']:<14}"
        f"own {row['own_gflop_per_s']:7.1f}  ATen {row['aten_gflop_per_s']:7.1f} GFLOP/s  "
        f"{speedup['median']:5.2f}x [{speedup['q1']:.2f}, {speedup['q3']:.2f}]  {row['own_gb_per_s']:6.1f} GB/s"
        f" {' ' if row['beyond_cache'] else 'c'}  error {error['own']:.0e}"
        + ("  (the package runs ATen here)" if row["plan"] == "aten" else "")
        + ("  (ATen: slow_conv2d)" if row["aten_runs"] == "slow_conv2d" else "")
    )


def add_shares(rows: Sequence[Row], found: Sequence[Ceiling]) -> list[Ceiling]:
    """Adds each row's fractions of the ceilings, and returns the ceilings that hold when the rows count too.

    `roof` is the lower of the two: what the multiply-adds, and the bytes at a copy's bandwidth, would allow. Winograd's
    algorithm does fewer multiply-adds than are counted, so a fraction may be above 1.
    """
    threads = torch.get_num_threads()
    raised = []
    for ceiling in found:
        best = ceiling
        for row in rows if ceiling.threads == threads else ():
            for side in ("own", "aten"):
                rate = number(row, f"{side}_gflop_per_s") * 1e9
                kernel = row["convolution"]["kernel"]  # type: ignore[index]
                if row["dtype"] == ceiling.kind and rate > best.per_s and ceilings.counts(side, kernel):
                    best = Ceiling(ceiling.kind, threads, rate, f"{side} {row['name']} {row['pass']}")
        raised.append(best)
    peak = {ceiling.kind: ceiling.per_s for ceiling in raised if ceiling.threads == threads}
    for row in rows:
        compute, copy = peak[str(row["dtype"])], peak["copy"]
        roof = min(compute, number(row, "intensity") * copy)
        row["bound"] = "compute" if roof == compute else "memory"
        for side in ("own", "aten"):
            rate = number(row, f"{side}_gflop_per_s") * 1e9
            row[f"{side}_of_ceiling"] = round(rate / compute, 4)
            row[f"{side}_of_copy"] = round(number(row, f"{side}_gb_per_s") * 1e9 / copy, 4)
            row[f"{side}_of_roof"] = round(rate / roof, 4)
    return raised


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Sums over the model, time x count, of each dtype and pass, and of passes together.

    ATen's time is taken as ours times the median ratio. The stem is no part of a block: its plain passes enter the
    fused sums of passes together.
    """
    result: list[Row] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = [row for row in rows if row["dtype"] == dtype]
        labels: dict[str, list[Row]] = {name: [row for row in group if row["pass"] == name] for name in PASSES}
        for label, names in TOGETHER.items():
            chosen = [row for row in group if row["pass"] in names]
            have = {(row["name"], row["pass"]) for row in chosen}
            if label != "convolutions alone" and chosen:
                chosen += [
                    row for row in group
                    if f"{row['pass']} fused" in names and (row["name"], f"{row['pass']} fused") not in have
                ]  # fmt: skip
            if len({row["pass"] for row in chosen}) > 1:
                labels[label] = chosen
        for label, chosen in labels.items():
            if not chosen:
                continue
            own = [number(row, "count") * median(row, "own_seconds") for row in chosen]
            aten = [t * median(row, "speedup") for t, row in zip(own, chosen, strict=True)]
            flops = sum(number(row, "count") * number(row, "flops") for row in chosen)
            peak = number(chosen[0], "own_gflop_per_s") / number(chosen[0], "own_of_ceiling")
            result.append(
                {
                    "name": label, "dtype": dtype, "shapes": len(chosen),
                    "faster_shapes": sum(median(row, "speedup") > 1 for row in chosen),
                    "own_seconds": float(f"{sum(own):.5g}"), "aten_seconds": float(f"{sum(aten):.5g}"),
                    "speedup": round(sum(aten) / sum(own), 4),
                    "own_gflop_per_s": round(flops / sum(own) / 1e9, 2),
                    "aten_gflop_per_s": round(flops / sum(aten) / 1e9, 2),
                    "own_of_ceiling": round(flops / sum(own) / 1e9 / peak, 4),
                    "aten_of_ceiling": round(flops / sum(aten) / 1e9 / peak, 4),
                }
            )  # fmt: skip
    return result


def print_summary(summary: Sequence[Row], found: Sequence[Ceiling]) -> None:
    """Ceilings and weighted figures as tables."""
    print()
    for ceiling in found:
        unit = "GB/s" if ceiling.kind == "copy" else "GFLOP/s"
        threads = f"{ceiling.threads} thread{'s' * (ceiling.threads != 1)}"
        print(f"ceiling {ceiling.kind:<6}{threads:<11}{ceiling.per_s / 1e9:8.1f} {unit:<9}{ceiling.by}")
    print(
        f"\n{'weighted by count':<26}{'dtype':<7}{'own':>8}{'ATen':>9}{'GFLOP/s':>9}{'of ceiling':>12}{'faster':>9}"
        f"{'faster shapes':>15}"
    )
    for row in summary:
        print(
            f"{row['name']:<26}{row['dtype']:<7}{row['own_gflop_per_s']:>8.1f}{row['aten_gflop_per_s']:>9.1f}"
            f"{row['own_of_ceiling']:>15.0%} /{row['aten_of_ceiling']:>4.0%}{row['speedup']:>8.2f}x"
            f"{row['faster_shapes']:>9} of {row['shapes']}"
        )


def run(options: argparse.Namespace) -> tuple[list[Row], list[Row], list[Ceiling]]:
    """Rows, summary and ceilings of the convolutions."""
    chosen = selected(options)
    passes = sum(len([name for name in options.passes if name in conv.passes()]) for conv in chosen)
    progress = timing.Progress(passes * len(options.dtype) * options.rounds)
    progress.begin("ceilings")
    with torch.no_grad():
        found = [] if options.dry else ceilings.measure(options)
        rows = [row for dtype in options.dtype for conv in chosen for row in measure(conv, dtype, options, progress)]
    progress.close()
    found = add_shares(rows, found) if rows else found
    return rows, summarise(rows), found


def in_huge_pages(arguments: Sequence[str]) -> int | None:
    """Runs this script again in a process whose malloc uses huge pages; None: this one's does already."""
    environment = timing.huge_page_environment()
    if environment is None:
        return None
    return subprocess.run([sys.executable, __file__, *arguments], check=False, env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if not fr.is_available():
        raise SystemExit(f"nothing of ours to time: {fr.build_info()['why_unavailable']}")
    if options.pages == "resident" and not options.dry:
        status = in_huge_pages(arguments)
        if status is not None:
            if status:
                raise SystemExit(status)
            return
        if not timing.keep_freed_memory():
            raise SystemExit("--pages resident: this C library has no mallopt; --pages fresh needs none")
    timing.apply_common_options(options)
    found: list[Ceiling] = []
    if options.blocks:
        rows, summary = conv_blocks.run(options)
    else:
        rows, summary, found = run(options)
    if options.dry:
        print("dry run: everything agreed, nothing timed")
        return
    if options.blocks:
        conv_blocks.print_summary(summary)
    else:
        print_summary(summary, found)
    name = "blocks" if options.blocks else "conv"
    result = timing.document(name, options, rows, summary, ceilings=[ceiling.to_json() for ceiling in found])
    print(f"\nwritten: {timing.show(timing.write(result, options.output, f'{name}-{options.model}'))}")


if __name__ == "__main__":
    main()
