"""What a run writes for later: steps.csv, epochs.csv, and TensorBoard events when asked."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fused_resnet.train.errors import INSTALL, UserError

STEP_COLUMNS = ("step", "epoch", "lr", "loss")
EPOCH_COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_second",
    "seconds",
)


class CsvLog:
    """A table that survives being killed: each row is flushed, and resuming cuts off what came after the checkpoint.

    Args:
        path: the file.
        columns: their names; one of them is "step".
        resume_step: keep the rows up to this step and go on; None: begin a new table.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int | None) -> None:
        self.columns = columns
        rows = [] if resume_step is None else _rows_until(path, columns, resume_step)
        temporary = path.with_name(path.name + ".partial")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(temporary, path)
        # Line by line, so that a row is on its way to the disk before the next step begins.
        self._file: TextIO = path.open("a", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def add(self, row: Mapping[str, Any]) -> None:
        # repr of a float is exact: two runs agree bit for bit when their tables are equal.
        self._writer.writerow([repr(v) if isinstance(v := row[c], float) else v for c in self.columns])

    def close(self) -> None:
        self._file.close()


def _rows_until(path: Path, columns: tuple[str, ...], step: int) -> list[list[str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file))[1:]
    at = columns.index("step")
    # A row torn by a kill has too few cells or no number; all after it is newer still.
    return [row for row in rows if len(row) == len(columns) and row[at].isdigit() and int(row[at]) <= step]


class TensorBoardLog:
    """Scalars for TensorBoard, under `folder`."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(f"--tensorboard needs the package tensorboard: {INSTALL}") from None
        # purge_step hides the events of steps that a killed run had logged after its last checkpoint.
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)  # type: ignore[no-untyped-call]

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
