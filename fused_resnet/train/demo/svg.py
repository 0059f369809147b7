"""Small charts as inline SVG. Colours come from the page's style sheet, so that one chart serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

TIMES = "\N{MULTIPLICATION SIGN}"
# One width for all charts; the page scales them.
WIDTH = 520
HEIGHT = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 62, 14, 40


@dataclass(frozen=True)
class Series:
    """A line: `kind` is its style class, "fused" or "stock"."""

    label: str
    kind: str
    xs: Sequence[float]
    ys: Sequence[float]
    marks: bool = False


@dataclass(frozen=True)
class Axis:
    """A vertical axis from `low` to `high`."""

    low: float
    high: float
    label: str
    show: Callable[[float], str]
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where `value` stands: 0 at the bottom, 1 at the top."""
        if self.log:
            value = max(value, self.low)
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wanted = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high * 1.0001]
            # With more than two decades, only powers of ten have room.
            return (
                wanted if len(wanted) <= 7 else [t for t in wanted if abs(math.log10(t) - round(math.log10(t))) < 1e-9]
            )
        step = nice_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^n that is at least `rough`."""
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))


def line_chart(series: Sequence[Series], axis: Axis, *, x_high: float, x_label: str, title: str) -> str:
    """Lines over 0 (or 1, with marks) to `x_high`; the last value of each is written at its end."""
    parts = _frame(axis, x_high, x_label)
    for line in series:
        points = [(_x(x, x_high), _y(y, axis)) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        if line.marks:
            for (x, y), epoch, value in zip(points, line.xs, line.ys, strict=True):
                tip = escape(f"{line.label}, epoch {epoch:g}: {axis.show(value)}")
                parts.append(
                    f'<circle class="mark {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
                )
    parts += _end_labels(series, axis, x_high)
    return _svg(parts, title, HEIGHT)


def ratio_chart(ratios: Sequence[float], median: float, *, title: str) -> str:
    """One dot per epoch, the median as a line, and the line of no gain."""
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    margin = max(0.05, 0.15 * (high - low))
    axis = Axis(low - margin, high + margin, "times as fast", lambda v: f"{v:.2f}{TIMES}")
    count = len(ratios)
    parts = _frame(axis, count, "epoch")
    right = WIDTH - _RIGHT
    for value, kind in ((1.0, "even"), (median, "median")):
        y = _y(value, axis)
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    apart = abs(_y(median, axis) - _y(1.0, axis)) >= 14
    if apart:
        parts.append(f'<text class="tick" x="{right + 8}" y="{_y(1.0, axis) + 4:.1f}">stock</text>')
    parts.append(f'<text class="end fused" x="{right + 8}" y="{_y(median, axis) + 4:.1f}">{median:.2f}{TIMES}</text>')
    for epoch, ratio in enumerate(ratios, 1):
        x, y = _x(epoch, count), _y(ratio, axis)
        tip = f"epoch {epoch}: {ratio:.2f} times as fast"
        parts.append(f'<circle class="mark fused" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{tip}</title></circle>')
    return _svg(parts, title, HEIGHT)


def bars(rows: Sequence[tuple[str, str, float, str]], *, title: str) -> str:
    """Horizontal bars from zero: (label, kind, value, text)."""
    height, gap, left, room = 40, 16, 62, 110
    top = max(value for _, _, value, _ in rows) or 1.0
    parts = []
    for i, (label, kind, value, text) in enumerate(rows):
        y = i * (height + gap) + 4
        length = max(2.0, (WIDTH - left - room) * value / top)
        middle = y + height / 2 + 5
        parts.append(f'<text class="name" x="{left - 10}" y="{middle}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="bar {kind}" x="{left}" y="{y}" width="{length:.1f}" height="{height}" rx="4"/>')
        parts.append(f'<text class="value" x="{left + length + 10:.1f}" y="{middle}">{escape(text)}</text>')
    return _svg(parts, title, len(rows) * (height + gap))


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str) -> str:
    """A confusion matrix: rows are the truth, columns what was read."""
    cell, left, top = 42, 74, 52
    size = len(names) * cell
    parts = [
        f'<text class="axis" x="{left + size / 2}" y="14" text-anchor="middle">read as</text>',
        f'<text class="axis" transform="translate(14 {top + size / 2}) rotate(-90)" text-anchor="middle">is a</text>',
    ]
    for i, name in enumerate(names):
        centre = i * cell + cell / 2
        parts.append(
            f'<text class="name" x="{left + centre}" y="{top - 12}" text-anchor="middle">{escape(name)}</text>'
        )
        parts.append(
            f'<text class="name" x="{left - 14}" y="{top + centre + 5}" text-anchor="end">{escape(name)}</text>'
        )
    for row, line in enumerate(counts):
        total = max(1, sum(line))
        for column, count in enumerate(line):
            x, y = left + column * cell, top + row * cell
            kind = "none" if count == 0 else "right" if row == column else "wrong"
            # Mistakes are few: they are shown strong however rare, hits by their share.
            strength = 1.0 if kind != "right" else 0.25 + 0.75 * count / total
            tip = escape(f"{count} {TIMES} {names[row]} read as {names[column]}")
            parts.append(
                f'<rect class="cell {kind}" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="5" '
                f'fill-opacity="{strength:.2f}"><title>{tip}</title></rect>'
            )
            if count:
                place = f'x="{x + cell / 2}" y="{y + cell / 2 + 5}"'
                parts.append(f'<text class="count {kind}" {place} text-anchor="middle">{count}</text>')
    return _svg(parts, title, top + size + 4)


def _x(value: float, high: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / high


def _y(value: float, axis: Axis) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * axis.fraction(value)


def _frame(axis: Axis, x_high: float, x_label: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in axis.ticks():
        y = _y(tick, axis)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{axis.show(tick)}</text>')
    step = max(1, round(nice_step(x_high / 8)))
    for tick in range(0, math.floor(x_high) + 1, step):
        x = _x(tick, x_high)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="axis" x="{right}" y="{bottom + 34}" text-anchor="end">{escape(x_label)}</text>')
    return parts


def _end_labels(series: Sequence[Series], axis: Axis, x_high: float) -> list[str]:
    """Pushed apart where two lines end at nearly the same height."""
    ends = sorted(((_y(line.ys[-1], axis), line) for line in series), key=lambda end: end[0])
    parts, lowest = [], -math.inf
    spread = 15.0
    if len(ends) == 2 and ends[1][0] - ends[0][0] < spread:
        lowest = (ends[0][0] + ends[1][0]) / 2 - 1.5 * spread
    for y, line in ends:
        lowest = max(y, lowest + spread) if lowest > -math.inf and y < lowest + spread else max(y, lowest)
        text = escape(axis.show(line.ys[-1]))
        parts.append(
            f'<text class="end {line.kind}" x="{_x(x_high, x_high) + 8:.1f}" y="{lowest + 4:.1f}">{text}</text>'
        )
    return parts


def _svg(parts: Sequence[str], title: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
