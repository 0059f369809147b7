"""inference.svg: a panel for each dtype, a bar for each contestant of bench/inference.py at each model and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plot import COLOURS, GRID, INK, MUTED, Row, canvas, save, where

CONTESTANTS = {
    "eager": ("eager PyTorch", "#9aa5b1"),
    "inductor": ("inductor, frozen", "#7b6fb0"),
    "openvino": ("OpenVINO", "#2f6fb0"),
    "onnxruntime": ("ONNX Runtime", "#e07b39"),
}


def draw_inference(result: dict[str, object], output: Path) -> None:
    """Writes how many times as fast ours is as each contestant, with the middle half of the rounds as a whisker."""
    plt = canvas()
    from matplotlib.patches import Patch

    rows, machine = result["rows"], result["machine"]
    assert isinstance(rows, list)
    assert isinstance(machine, dict)
    names = [name for name in CONTESTANTS if any(f"speedup_over_{name}" in row for row in rows)]
    if not names:
        raise SystemExit("nothing to draw: these results have no ratio between ours and another contestant")
    groups = list(dict.fromkeys(_label(row) for row in rows))
    dtypes = [dtype for dtype in COLOURS if any(row["dtype"] == dtype for row in rows)]
    height = 0.84 / len(names)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(13, 2.2 + 0.26 * len(groups) * len(names)), sharey=True, squeeze=False,
        facecolor="white", layout="constrained",
    )  # fmt: skip
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        widest = 1.0
        for row in (row for row in rows if row["dtype"] == dtype):
            for place, name in enumerate(names):
                speedup: Any = row.get(f"speedup_over_{name}")
                if speedup is None:
                    continue
                at = groups.index(_label(row)) + (place - (len(names) - 1) / 2) * height
                axes.barh(at, speedup["median"], height * 0.9, color=CONTESTANTS[name][1], zorder=2)
                axes.hlines(at, speedup["q1"], speedup["q3"], color=INK, linewidth=1.6, zorder=3)
                end = max(speedup["median"], speedup["q3"])
                axes.text(end, at, f" {speedup['median']:.2f}x", va="center", color=INK, size=11)
                widest = max(widest, end)
        axes.axvline(1, color=INK, linewidth=1.5, zorder=4)
        axes.set_title(dtype, loc="left", color=INK, weight="bold")
        axes.set_xlim(0, widest * 1.16)
        axes.set_yticks(range(len(groups)), groups, color=INK)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlabel("ours, times as fast as each", color=MUTED)
        axes.tick_params(axis="both", length=0, labelcolor=INK)
        axes.grid(axis="x", color=GRID, zorder=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    handles = [Patch(color=CONTESTANTS[name][1]) for name in names]
    labels = [CONTESTANTS[name][0] for name in names]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False, labelcolor=INK)
    note = f"{where(machine)}; lines: middle half of the rounds"
    figure.supxlabel(note, x=0.995, ha="right", size=11, color=MUTED)
    save(figure, output)


def _label(row: Row) -> str:
    return f"{row['name']}, batch {row['batch']}"
