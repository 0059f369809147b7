"""CSV tables, TensorBoard, and the progress bar."""

import io
import sys
from pathlib import Path

import pytest

from fused_resnet.train.errors import UserError
from fused_resnet.train.log import CsvLog, TensorBoardLog
from fused_resnet.train.progress import Progress, clock, notice

COLUMNS = ("step", "loss")


def _fill(path: Path, first: int, last: int, resume_step: int | None) -> None:
    log = CsvLog(path, COLUMNS, resume_step)
    for step in range(first, last + 1):
        log.add({"step": step, "loss": 0.1 * step})
    log.close()


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    _fill(tmp_path / "whole.csv", 1, 9, None)
    _fill(tmp_path / "resumed.csv", 1, 6, None)
    _fill(tmp_path / "resumed.csv", 5, 9, 4)
    whole = (tmp_path / "whole.csv").read_text()
    assert (tmp_path / "resumed.csv").read_text() == whole
    assert whole.splitlines()[:4] == ["step,loss", "1,0.1", "2,0.2", "3,0.30000000000000004"]


@pytest.mark.parametrize("torn", ["7", "7,0.7", "7,", "\x00", ""])
def test_a_torn_last_row_does_not_matter(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "log.csv"
    _fill(path, 1, 6, None)
    with path.open("a") as file:
        file.write(torn)
    _fill(path, 7, 7, 6)
    assert path.read_text().splitlines()[1:] == [f"{step},{0.1 * step!r}" for step in range(1, 8)]


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv", COLUMNS, None)
    log.add({"step": 1, "loss": 0.5})
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.5\n"
    log.close()


def test_tensorboard_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard needs the package tensorboard: pip install"):
        TensorBoardLog(tmp_path, None)


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path, None)
    for step in (1, 2):
        log.add({"loss/step": step / 2}, step)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/step")] == [(1, 0.5), (2, 1.0)]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_redrawn() -> None:
    stream = _Terminal()
    progress = Progress(4, stream=stream)
    progress.step("epoch 1/2", 1, 2, "loss 0.5", 30.0)
    drawn = stream.getvalue()
    assert drawn.startswith("\r")
    assert "\n" not in drawn
    assert "epoch 1/2 ████████████············ loss 0.5  1:30 left" in drawn
    progress.step("epoch 1/2", 2, 2, "loss 0.4", 30.0)
    progress.epoch("epoch 1/2", "loss 0.45")
    assert stream.getvalue().endswith("epoch 1/2 loss 0.45  1:00 left\n")


def test_without_a_terminal_lines_are_few_and_plain() -> None:
    stream = io.StringIO()
    progress = Progress(200, stream=stream)
    for step in range(100):
        progress.step("epoch 1/2", step + 1, 100, "loss 0.5", 1.0)
    progress.epoch("epoch 1/2", "loss 0.5")
    assert stream.getvalue() == "epoch 1/2 loss 0.5  1:40 left\n"


def test_quiet_and_resumed() -> None:
    stream = io.StringIO()
    quiet = Progress(2, stream=stream, quiet=True)
    quiet.step("e", 1, 2, "t", 1.0)
    quiet.epoch("e", "t")
    assert stream.getvalue() == ""
    resumed = Progress(100, stream=stream)
    resumed.start_at(90)
    resumed.step("e", 1, 10, "t", 2.0)
    resumed.epoch("e", "t")
    assert stream.getvalue() == "e t  0:18 left\n"


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]


def test_notice(capsys: pytest.CaptureFixture[str]) -> None:
    notice("hello")
    assert capsys.readouterr().err == "hello\n"
