"""Draws the results: `python bench/plot.py` reads the fullest ones and writes the pictures in docs/images.

    python bench/plot.py                     every picture that has results
    python bench/plot.py RESULT.json         the one picture of these results; --output x.png writes it elsewhere

speed.svg     of bench/models.py: how many times as fast as eager PyTorch a training step is, a bar for each model,
              dtype and batch, with the middle half of the rounds as a whisker.
roofline.svg  of bench/conv.py: each convolution's arithmetic intensity and speed, ours and ATen's at the two ends of a
              line, under what the machine reached at multiplying and at copying.
inference.svg of bench/inference.py: how many times as fast as each contestant ours is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing

Row = dict[str, object]

INK, MUTED, GRID = "#1f2933", "#52606d", "#d9dee4"
COLOURS = {"fp32": "#2f6fb0", "bf16": "#e07b39"}
IMAGES = timing.ROOT.parent / "docs" / "images"
# A benchmark's name to its result files and its picture.
FILES = {"models": "*/models.json", "conv": "*/conv-resnet50.json", "inference": "*/inference.json"}
PICTURES = {"models": "speed.svg", "conv": "roofline.svg", "inference": "inference.svg"}
OURS, THEIRS = "#2f6fb0", "#e07b39"
MARKERS = {"forward": "o", "data": "s", "weight": "^"}
MARKER_NAMES = {"forward": "forward", "data": "data gradient", "weight": "weight gradient"}


def fullest_results() -> list[Path]:
    """For each picture that has any, the result file with the most rows: a machine at hand for minutes has few."""

    def rows_and_age(path: Path) -> tuple[int, str]:
        result = read(path)
        rows = result["rows"]
        assert isinstance(rows, list)
        return len(rows), str(result["created"])

    found = [list(timing.RESULTS.glob(pattern)) for pattern in FILES.values()]
    if not any(found):
        raise SystemExit("no bench/results/*/models.json: run bench/models.py first")
    return [max(paths, key=rows_and_age) for paths in found if paths]


def read(path: Path) -> dict[str, object]:
    """A checked result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        timing.check(result)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error
    if result["benchmark"] not in PICTURES or not result["rows"]:
        scripts = ", ".join(f"bench/{name}.py" for name in PICTURES)
        raise SystemExit(f"{path}: expected results of one of {scripts}, got {result['benchmark']}")
    return dict(result)


def label(row: Row) -> str:
    """What stands beside a bar."""
    name = str(row["name"]).replace("cifar.", "").replace("resnet", "ResNet-", 1)
    return f"{name}, {row['size']} px, batch {row['batch']}"


def canvas() -> Any:
    """pyplot, set up so that the same results give the same file: fixed ids."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "sans-serif", "font.size": 15, "svg.hashsalt": "speed", "svg.fonttype": "path"})
    return plt


def save(figure: Any, output: Path) -> None:
    """Writes a picture without its date; the format is the suffix of `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, dpi=160, facecolor="white", metadata=metadata)


def where(machine: dict[str, object]) -> str:
    """Processor, threads and version, for the line below a picture."""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['cpu']}, {threads}, PyTorch {machine['torch']}"


def draw_speed(result: dict[str, object], output: Path) -> None:
    """Writes the bars of training steps."""
    plt = canvas()
    from matplotlib.patches import Patch

    rows = result["rows"]
    machine = result["machine"]
    assert isinstance(rows, list)
    assert isinstance(machine, dict)
    rows = [row for row in rows if row["layout"] == "channels_last"] or rows
    groups = list(dict.fromkeys(label(row) for row in rows))
    dtypes = [dtype for dtype in COLOURS if any(row["dtype"] == dtype for row in rows)]
    height = 0.8 / len(dtypes)
    figure, axes = plt.subplots(figsize=(11, 1.9 + 0.62 * len(groups) * len(dtypes)), facecolor="white")
    widest = max(row["speedup"]["median"] for row in rows)
    for row in rows:
        speedup = row["speedup"]
        at = groups.index(label(row)) + (dtypes.index(row["dtype"]) - (len(dtypes) - 1) / 2) * height
        axes.barh(at, speedup["median"], height * 0.88, color=COLOURS[row["dtype"]], zorder=2)
        axes.hlines(at, speedup["q1"], speedup["q3"], color=INK, linewidth=2, zorder=3)
        text = f"{speedup['median']:.2f}x"
        axes.text(
            max(speedup["median"], speedup["q3"]) + 0.02 * widest, at, text, va="center", color=INK, weight="bold"
        )
    axes.axvline(1, color=INK, linewidth=1.5, zorder=4)
    axes.text(1, -0.62, "eager PyTorch", ha="center", va="bottom", color=MUTED, size=13)
    axes.set_yticks(range(len(groups)), groups, color=INK)
    axes.set_ylim(len(groups) - 0.45, -0.6)
    axes.set_xlim(0, widest * 1.14)
    axes.set_xlabel("training speed, times eager PyTorch", color=MUTED)
    axes.tick_params(axis="both", length=0, labelcolor=INK)
    axes.grid(axis="x", color=GRID, zorder=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=COLOURS[dtype]) for dtype in dtypes]
    names = [{"fp32": "fp32", "bf16": "bf16 autocast"}[dtype] for dtype in dtypes]
    axes.legend(handles, names, loc="lower right", ncols=len(dtypes), frameon=False, bbox_to_anchor=(1.0, 1.04))
    note = f"{where(machine)}; lines: middle half of the rounds"
    figure.text(0.995, 0.008, note, ha="right", va="bottom", size=11, color=MUTED)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, output)


def shown_passes(result: dict[str, object], plain: bool) -> list[Row]:
    """The rows to draw: the plain passes, or the fused ones with those plain ones that have nothing to fuse."""
    rows = result["rows"]
    assert isinstance(rows, list)
    fused = {(row["name"], row["pass"]) for row in rows if str(row["pass"]).endswith(" fused")}
    if plain or not fused:
        return [row for row in rows if row["pass"] in MARKERS]
    return [row for row in rows if (row["name"], f"{row['pass']} fused") not in fused]


def draw_roofline(result: dict[str, object], output: Path, plain: bool = False) -> None:
    """Writes a panel for each dtype: arithmetic intensity against speed, under the measured ceilings."""
    plt = canvas()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows, machine, options = shown_passes(result, plain), result["machine"], result["options"]
    assert isinstance(machine, dict)
    assert isinstance(options, dict)
    ceilings = result["ceilings"]
    assert isinstance(ceilings, list)
    now = {ceiling["name"]: ceiling for ceiling in ceilings if ceiling["threads"] == machine["threads"]}
    copy = now["copy"]["gb_per_s"]
    dtypes = [dtype for dtype in COLOURS if any(row["dtype"] == dtype for row in rows)]
    peaks = [now[dtype]["gflop_per_s"] for dtype in dtypes]
    intensities = [float(str(row["intensity"])) for row in rows]
    # Wide enough to show the ridge, where the two ceilings meet.
    left = min(min(intensities) / 1.4, min(peaks) / copy / 2.2)
    right = max(intensities) * 1.4

    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(13, 6.6), squeeze=False, facecolor="white", layout="constrained"
    )
    for axes, dtype, peak in zip(panels[0], dtypes, peaks, strict=True):
        speeds = [float(str(r[f"{side}_gflop_per_s"])) for r in rows for side in ("own", "aten") if r["dtype"] == dtype]
        bottom, top = min(speeds) / 1.25, max(peak, *speeds) * 1.25
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        ridge = peak / copy
        axes.plot([left, ridge], [left * copy, peak], color=INK, linewidth=1.8, zorder=2)
        axes.plot([ridge, right], [peak, peak], color=INK, linewidth=1.8, zorder=2)
        axes.fill_between([left, ridge, right], [left * copy, peak, peak], top, color="#f3f5f7", zorder=0, linewidth=0)
        axes.annotate(
            f"{peak:.0f} GFLOP/s", (right, peak), (-6, 5), textcoords="offset points", ha="right", color=INK, size=13
        )
        # Along the slope, past the middle of what is visible of it.
        middle = max(left, bottom / copy) ** 0.4 * ridge**0.6
        axes.text(
            middle / 1.07, middle * copy * 1.03, f"copy {copy:.0f} GB/s", rotation_mode="anchor",
            rotation=math.degrees(math.atan(copy)), transform_rotates_text=True, ha="center", va="bottom", color=INK,
            size=13,
        )  # fmt: skip
        if max(speeds) > peak:
            axes.text(
                0.02, 0.97, "beyond: Winograd,\nfewer operations than counted", transform=axes.transAxes, va="top",
                color=MUTED, size=13,
            )  # fmt: skip
        for row in (row for row in rows if row["dtype"] == dtype):
            marker = MARKERS[str(row["pass"]).removesuffix(" fused")]
            x, own, aten = row["intensity"], row["own_gflop_per_s"], row["aten_gflop_per_s"]
            axes.vlines(x, min(own, aten), max(own, aten), color="#9aa5b1", linewidth=0.9, zorder=3)
            axes.plot(
                x, aten, marker, markersize=7.5, markerfacecolor="white", markeredgecolor=THEIRS, markeredgewidth=1.7,
                zorder=4,
            )  # fmt: skip
            axes.plot(
                x, own, marker, markersize=8.5, color=OURS, markeredgecolor="white", markeredgewidth=0.8, zorder=5
            )
        axes.set_title({"fp32": "fp32", "bf16": "bf16, fp32 accumulation"}[dtype], loc="left", color=INK, weight="bold")
        axes.set_xlabel("arithmetic intensity, FLOP per byte", color=MUTED)
        plain_numbers = FuncFormatter(lambda value, _: f"{value:g}")
        for axis, low, high, steps in ((axes.xaxis, left, right, (1, 2, 5)), (axes.yaxis, bottom, top, (1, 2, 3, 5))):
            ticks = [t * 10**e for e in range(-1, 5) for t in steps if low <= t * 10**e <= high]
            axis.set_ticks(ticks)
            axis.set_major_formatter(plain_numbers)
            axis.set_minor_locator(NullLocator())
        axes.grid(color=GRID, linewidth=0.8, zorder=1)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
    panels[0][0].set_ylabel("GFLOP/s", color=MUTED)

    def handle(marker: str, filled: bool, colour: str) -> Any:
        return Line2D(
            [], [], linestyle="", marker=marker, markersize=10, color=colour, markeredgewidth=1.8,
            markerfacecolor=colour if filled else "white",
        )  # fmt: skip

    handles = [handle("o", True, OURS), handle("o", False, THEIRS)]
    handles += [handle(marker, True, MUTED) for marker in MARKERS.values()]
    names = ["fused_resnet", "PyTorch (oneDNN)", *MARKER_NAMES.values()]
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        handletextpad=0.2,
        labelcolor=INK,
    )
    what = "convolutions alone" if plain else "convolutions with batch norm and relu"
    model = str(options["model"]).replace("cifar.", "").replace("resnet", "ResNet-", 1)
    note = f"{model} {what}, batch {options['batch']}, channels_last; {where(machine)}"
    figure.supxlabel(note, x=0.995, ha="right", size=11, color=MUTED)
    save(figure, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="a result file (default: the fullest of each kind)")
    parser.add_argument("--output", type=Path, help="picture to write: .svg or .png (default: in docs/images)")
    parser.add_argument("--plain", action="store_true", help="roofline: of the convolutions alone")
    options = parser.parse_args(arguments)
    if options.output is not None and options.results is None:
        parser.error("--output: name the results too")
    for path in [options.results] if options.results else fullest_results():
        result = read(path)
        benchmark = str(result["benchmark"])
        output = options.output or IMAGES / PICTURES[benchmark]
        if benchmark == "models":
            draw_speed(result, output)
        elif benchmark == "inference":
            from plot_inference import draw_inference

            draw_inference(result, output)
        else:
            draw_roofline(result, output, options.plain)
        print(f"written: {timing.show(output)}")


if __name__ == "__main__":
    main()
