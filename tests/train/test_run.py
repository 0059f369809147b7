"""Whole training runs on tiny data, through the command line."""

import csv
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import cli
from fused_resnet.nn import guard
from fused_resnet.train import checkpoint
from fused_resnet.train.data import open_dataset
from fused_resnet.train.errors import CheckpointError, DataError, DivergedError, OptionError
from fused_resnet.train.options import TrainOptions
from fused_resnet.train.run import make_trainer, open_data, start_or_resume, train
from fused_resnet.train.trainer import Trainer
from tests.train import files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(files.write_idx(tmp_path_factory.mktemp("mnist"), train=40, test=20, side=8))


def _options(data: str, out: Path, **changes: Any) -> TrainOptions:
    base: dict[str, Any] = {"model": "cifar.resnet20", "data": data, "out": str(out), "size": 8, "quiet": True}
    return TrainOptions(**{**base, "epochs": 2, "batch_size": 10, "lr": 0.05, **changes})


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_leaves_its_logs(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    line = f"train --model cifar.resnet20 --data {data} --out {out} --size 8 --epochs 20 --batch-size 10 --lr 0.02"
    assert cli.main([*line.split(), "--shift", "0", "--warmup-epochs", "1"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "after 20 epochs" in stdout
    assert "269,722 parameters" in stderr
    assert stderr.count("\n") == 21  # what is trained, then one line for each epoch
    epochs, steps = _table(out / "epochs.csv"), _table(out / "steps.csv")
    assert [row["step"] for row in steps] == [str(step) for step in range(1, 81)]
    assert [row["epoch"] for row in epochs] == [str(epoch) for epoch in range(1, 21)]
    # Ten classes that a glance tells apart: chance is a loss of 2.3 and an accuracy of 10%.
    assert float(epochs[-1]["train_loss"]) < 0.3
    assert float(epochs[-1]["test_accuracy"]) > 0.6
    mean = sum(float(row["loss"]) for row in steps[-4:]) / 4
    assert float(epochs[-1]["train_loss"]) == pytest.approx(mean, rel=1e-6)
    state = checkpoint.load(out / "best.pt")
    assert state["best_accuracy"] == max(float(row["test_accuracy"]) for row in epochs)


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"channels_last": False},
        {"label_smoothing": 0.1, "nesterov": True},
        {"schedule": "step", "milestones": "1"},
        {"model": "resnet18", "size": 32, "epochs": 1},
        {"model": "preact.cifar_preresnet110", "epochs": 1, "batch_size": 20},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    summary = train(_options(data, tmp_path, **changes))
    assert all(math.isfinite(row["train_loss"]) for row in summary.history)
    if changes.get("schedule") == "step":
        rates = [float(row["lr"]) for row in _table(tmp_path / "steps.csv")]
        assert rates == pytest.approx([0.05] * 4 + [0.005] * 4)


def test_photographs_train_and_broken_ones_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = files.write_photos(tmp_path / "photos", files.RED_AND_BLUE, count=20)
    whole = (photos / "red" / "0.png").read_bytes()
    (photos / "red" / "cut.png").write_bytes(whole[:60])
    options = _options(str(photos), tmp_path / "run", size=16, batch_size=9, lr=0.02, epochs=5, seed=1)
    with pytest.raises(DataError, match=r"cut\.png.*--skip-broken"):
        train(options)
    options = _options(
        str(photos), tmp_path / "run2", size=16, batch_size=9, lr=0.02, epochs=5, seed=1, skip_broken=True
    )
    assert train(options).test_accuracy == 1.0
    assert capsys.readouterr().err.count("cut.png") == 1


@pytest.mark.parametrize("stock", [False, True])
def test_stock_turns_the_fused_kernels_off_and_nothing_else(data: str, tmp_path: Path, stock: bool) -> None:
    options = _options(data, tmp_path, stock=stock)
    trainer, _ = make_trainer(options, open_data(options))
    seen: list[str | None] = []

    def ask(unit: Any, *_: object) -> None:
        seen.append(guard._why_stock_now())

    trainer.model.register_forward_pre_hook(ask)
    next(trainer.steps())
    assert ("stock() is in force" in seen) == (stock and guard._extension.available())
    assert guard._why_stock_now() != "stock() is in force"


def test_fused_and_stock_begin_alike(data: str, tmp_path: Path) -> None:
    losses = []
    for stock in (False, True):
        options = _options(data, tmp_path, stock=stock)
        trainer, _ = make_trainer(options, open_data(options))
        losses.append(next(trainer.steps()).loss)
    # One forward of 20 layers: rounding only.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_step_is_sgd(data: str, tmp_path: Path) -> None:
    """One step against the formula: weights - lr * (gradient + decay * weights)."""
    options = _options(data, tmp_path, schedule="constant", weight_decay=0.01, label_smoothing=0.1, stock=True)
    trainer, _ = make_trainer(options, open_data(options))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    step = next(trainer.steps())
    assert step.lr == 0.05
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), before[name] - 0.05 * (p.grad + 0.01 * before[name]))


def test_an_existing_run_is_not_overwritten(data: str, tmp_path: Path) -> None:
    asked = {"model": "cifar.resnet20", "data": data, "out": str(tmp_path), "size": 8, "epochs": 1, "batch_size": 10}
    start_or_resume({**asked, "quiet": True}, resume=False)
    with pytest.raises(OptionError, match="holds a run already"):
        start_or_resume(asked, resume=False)


def test_resuming_a_finished_run_changes_nothing(data: str, tmp_path: Path) -> None:
    summary = train(_options(data, tmp_path))
    before = (tmp_path / "steps.csv").read_bytes()
    again = start_or_resume({"out": str(tmp_path), "quiet": True}, resume=True)
    assert (again.test_accuracy, again.epochs) == (summary.test_accuracy, 2)
    assert (tmp_path / "steps.csv").read_bytes() == before


def test_resume_errors(data: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no .*last\.pt"):
        start_or_resume({"out": str(tmp_path)}, resume=True)
    train(_options(data, tmp_path, epochs=1))
    with pytest.raises(OptionError, match=r"--lr 0\.3: the run to resume was started with 0\.05"):
        start_or_resume({"out": str(tmp_path), "lr": 0.3}, resume=True)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="corrupt"):
        start_or_resume({"out": str(tmp_path)}, resume=True)


def test_other_data_than_the_run_began_with(tmp_path: Path) -> None:
    data = str(files.write_idx(tmp_path / "data", side=8))
    train(_options(data, tmp_path / "run", epochs=1))
    files.write_idx(tmp_path / "data", train=30, side=8)
    with pytest.raises(Exception, match="not what the run began with"):
        start_or_resume({"out": str(tmp_path / "run")}, resume=True)


def test_resume_before_the_first_checkpoint_starts(data: str, tmp_path: Path) -> None:
    asked = {"model": "cifar.resnet20", "data": data, "out": str(tmp_path / "new"), "size": 8, "batch_size": 10}
    assert start_or_resume({**asked, "epochs": 1, "quiet": True}, resume=True).epochs == 1


def test_a_diverging_run_says_so(data: str, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf).*lower --lr"):
        train(_options(data, tmp_path, lr=1e30, epochs=20))
    checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_resumes(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole = train(_options(data, tmp_path / "whole", epochs=3))
    real = Trainer._step

    def interrupt(self: Trainer, *args: Any) -> Any:
        if self.step_number == 5:
            os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_step", interrupt)
    handler = signal.getsignal(number)
    stopped = train(_options(data, tmp_path / "cut", epochs=3))
    assert stopped.stopped
    assert signal.getsignal(number) is handler
    assert len(_table(tmp_path / "cut" / "steps.csv")) == 6
    monkeypatch.setattr(Trainer, "_step", real)
    resumed = start_or_resume({"out": str(tmp_path / "cut")}, resume=True)
    assert (tmp_path / "cut" / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()
    assert resumed.test_accuracy == whole.test_accuracy


def test_evaluation_counts(data: str, tmp_path: Path) -> None:
    options = _options(data, tmp_path, batch_size=7)
    dataset = open_data(options)
    trainer, test_batches = make_trainer(options, dataset)
    result = trainer.evaluate(test_batches)
    assert result.predictions.shape == (20,)
    assert result.accuracy == (result.predictions == open_dataset(data, size=8).test.labels).double().mean().item()
    assert (result.confidences > 0.1).all()
