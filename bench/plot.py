"""Draws the measured gains: `python bench/plot.py` reads the newest results and writes docs/images/speed.svg.

One bar per model, dtype and batch: how many times as fast as eager PyTorch a training step is, with the middle half of
the rounds as a whisker.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timing

Row = dict[str, object]

INK, MUTED, GRID = "#1f2933", "#52606d", "#d9dee4"
COLOURS = {"fp32": "#2f6fb0", "bf16": "#e07b39"}
OUTPUT = timing.ROOT.parent / "docs" / "images" / "speed.svg"


def newest_results() -> Path:
    """The models.json written last."""
    found = list(timing.RESULTS.glob("*/models.json"))
    if not found:
        raise SystemExit("no bench/results/*/models.json: run bench/models.py first")
    return max(found, key=lambda path: str(read(path)["created"]))


def read(path: Path) -> dict[str, object]:
    """A checked result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        timing.check(result)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error
    if result["benchmark"] != "models" or not result["rows"]:
        raise SystemExit(f"{path}: expected results of bench/models.py, got {result['benchmark']}")
    return dict(result)


def label(row: Row) -> str:
    """What stands beside a bar."""
    name = str(row["name"]).replace("cifar.", "").replace("resnet", "ResNet-", 1)
    return f"{name}, {row['size']} px, batch {row['batch']}"


def draw(result: dict[str, object], output: Path) -> None:
    """Writes the picture; its format is the suffix of `output`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    # Fixed ids and no date: the same results give the same file.
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 15, "svg.hashsalt": "speed", "svg.fonttype": "path"})
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
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    note = f"{machine['cpu']}, {threads}, PyTorch {machine['torch']}; lines: middle half of the rounds"
    figure.text(0.995, 0.008, note, ha="right", va="bottom", size=11, color=MUTED)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, dpi=160, facecolor="white", metadata=metadata)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="a result file of bench/models.py (default: the newest)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="picture to write: .svg or .png")
    options = parser.parse_args(arguments)
    draw(read(options.results or newest_results()), options.output)
    print(f"written: {timing.show(options.output)}")


if __name__ == "__main__":
    main()
