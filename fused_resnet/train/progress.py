"""A progress bar on stderr: loss, accuracy, images per second, time left. Plain lines where there is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_BAR_WIDTH = 24
# A terminal is redrawn no more often than this: drawing costs time that training could use.
_REDRAW_SECONDS = 0.1
# Without a terminal (a log file, CI) a line appears at most this often within an epoch.
_LINE_SECONDS = 30.0
_EIGHTHS = " ▏▎▍▌▋▊▉"


def notice(message: str) -> None:
    """One line for the user on stderr, on a line of its own even while a bar is shown."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Shows one line per epoch, redrawn in place on a terminal, and the time left.

    Args:
        total_steps: steps of the whole training; the time left is counted from them.
        stream: where to write; stderr by default.
        quiet: write nothing.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.total_steps = total_steps
        self.quiet = quiet
        self.live = self.stream.isatty()
        self._steps = 0
        self._seconds = 0.0
        self._next_draw = 0.0
        self._next_line = time.monotonic() + _LINE_SECONDS

    def start_at(self, step: int) -> None:
        """Counts the remaining steps from `step` (resuming); the speed is measured anew."""
        self.total_steps -= step

    def step(self, epoch: str, done: int, of: int, text: str, seconds: float) -> None:
        """One training step took `seconds`; it was number `done` of `of` in this epoch. `text` tells how it went."""
        self._steps += 1
        self._seconds += seconds
        now = time.monotonic()
        if self.quiet or (now < self._next_draw if self.live else now < self._next_line):
            return
        self._next_draw, self._next_line = now + _REDRAW_SECONDS, now + _LINE_SECONDS
        bar = _bar(done / of) if self.live else f"{done}/{of}"
        self._write(f"{epoch} {bar} {text}  {clock(self._left())} left")

    def epoch(self, epoch: str, text: str) -> None:
        """Closes an epoch with a line that stays."""
        if self.quiet:
            return
        left = self._left()
        self._write(f"{epoch} {text}" + (f"  {clock(left)} left" if left >= 1 else ""), keep=True)

    def _left(self) -> float:
        return (self.total_steps - self._steps) * self._seconds / max(1, self._steps)

    def clear(self) -> None:
        """Removes a half-drawn line."""
        if self.live and not self.quiet:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _write(self, line: str, *, keep: bool = False) -> None:
        if self.live:
            columns = shutil.get_terminal_size().columns
            self.stream.write(f"\r\x1b[K{line if keep else line[: columns - 1]}" + ("\n" if keep else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def _bar(fraction: float) -> str:
    eighths = round(max(0.0, min(1.0, fraction)) * _BAR_WIDTH * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(_BAR_WIDTH, "·")
