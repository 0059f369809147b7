"""A whole training run: open the data, build the network, train, log, write checkpoints, go on where one was killed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fused_resnet import _extension
from fused_resnet._version import __version__
from fused_resnet.train import checkpoint, networks
from fused_resnet.train.batches import TestBatches, TrainBatches
from fused_resnet.train.data import Dataset, open_dataset
from fused_resnet.train.errors import OptionError, UserError
from fused_resnet.train.log import EPOCH_COLUMNS, STEP_COLUMNS, CsvLog, TensorBoardLog
from fused_resnet.train.options import TrainOptions, plain, resumed
from fused_resnet.train.progress import Progress, notice
from fused_resnet.train.trainer import Evaluation, StepResult, Trainer

LAST = "last.pt"
BEST = "best.pt"


@dataclass
class Summary:
    """What a run came to. `stopped` is true when the user interrupted it."""

    out: Path
    epochs: int = 0
    test_accuracy: float = float("nan")
    best_accuracy: float = -1.0
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def start_or_resume(asked: dict[str, Any], *, resume: bool) -> Summary:
    """Trains with the options `asked`; with `resume`, goes on from the last checkpoint in its --out folder."""
    out = Path(asked.get("out", TrainOptions.out))
    last = out / LAST
    if not resume:
        options = TrainOptions(**asked)
        if last.exists():
            raise OptionError(f"--out {out}: holds a run already; go on with it (--resume) or choose another folder")
        return train(options)
    if not last.exists():
        if "model" not in asked or "data" not in asked:
            raise OptionError(f"--resume: there is no {last} to go on from")
        # Killed before its first checkpoint, a run has lost nothing: scripts may always say --resume.
        notice(f"no {last} yet: starting from the beginning")
        return train(TrainOptions(**asked))
    state = checkpoint.load(last)
    return train(resumed(state["options"], asked), state)


def open_data(options: TrainOptions) -> Dataset:
    """The data of a run, with the user's wishes about augmentation applied."""
    dataset = open_dataset(
        options.data,
        size=options.image_size(),
        seed=options.seed,
        test_fraction=options.test_fraction,
        skip_broken=options.skip_broken,
        workers=options.workers,
    )
    wishes = {n: v for n in ("shift", "flip", "min_scale") if (v := getattr(options, n)) is not None}
    dataset = replace(dataset, augment=replace(dataset.augment, **wishes))
    if len(dataset.train) < options.batch_size:
        raise OptionError(
            f"--batch-size {options.batch_size}: more than the {len(dataset.train)} training images of {dataset.name}"
        )
    return dataset


def make_trainer(options: TrainOptions, dataset: Dataset) -> tuple[Trainer, TestBatches]:
    """A trainer with fresh weights that only the seed decides, and the test batches that go with it."""
    device = pick_device(options)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    torch.manual_seed(options.seed)
    model = networks.build(options.model, len(dataset.classes))
    common: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std, "channels_last": options.channels_last}
    train_batches = TrainBatches(dataset.train, options.batch_size, options.seed, dataset.augment, **common)
    test_batches = TestBatches(dataset.test, options.batch_size, **common)
    return Trainer(model, options, train_batches, device), test_batches


def pick_device(options: TrainOptions) -> torch.device:
    """The device that --device means here."""
    try:
        device = _extension.pick_device(options.device, stock=options.stock)
    except ValueError as error:
        raise OptionError(f"--device {error}") from None
    if options.fp16 and device.type != "cuda":
        raise OptionError("--fp16: on a GPU only; on the CPU use --bf16")
    return device


def train(options: TrainOptions, state: dict[str, Any] | None = None) -> Summary:
    """Trains from the beginning, or on from the checkpoint `state`."""
    networks.check(options.model)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dataset = open_data(options)
    trainer, test_batches = make_trainer(options, dataset)
    summary = Summary(Path(options.out))
    if state is not None:
        _restore(trainer, summary, state, dataset)
    try:
        summary.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {options.out}: cannot be made ({error.strerror})") from None
    return _Run(options, dataset, trainer, test_batches, summary, fresh=state is None).go()


class _Run:
    def __init__(
        self,
        options: TrainOptions,
        dataset: Dataset,
        trainer: Trainer,
        test_batches: TestBatches,
        summary: Summary,
        *,
        fresh: bool,
    ) -> None:
        self.options, self.dataset, self.trainer, self.test_batches = options, dataset, trainer, test_batches
        self.summary = summary
        self.fresh = fresh
        self.progress = Progress(options.epochs * trainer.train_batches.steps_per_epoch, quiet=options.quiet)
        if not options.quiet:
            notice(_headline(options, dataset, trainer))

    def go(self) -> Summary:
        with ExitStack() as open_files:
            self._open_logs(open_files)
            stop = open_files.enter_context(_interrupts())
            self.progress.start_at(self.trainer.step_number)
            if self.fresh:
                self._save(LAST)
            while self.trainer.epoch < self.options.epochs:
                for step in self.trainer.steps():
                    self._after_step(step)
                    if stop.is_set():
                        return self._stopped()
                self._after_epoch()
                if stop.is_set() and self.trainer.epoch < self.options.epochs:
                    return self._stopped()
        return self.summary

    def _open_logs(self, open_files: ExitStack) -> None:
        out, at = self.summary.out, None if self.fresh else self.trainer.step_number
        self.step_log = CsvLog(out / "steps.csv", STEP_COLUMNS, at)
        open_files.callback(self.step_log.close)
        self.epoch_log = CsvLog(out / "epochs.csv", EPOCH_COLUMNS, at)
        open_files.callback(self.epoch_log.close)
        self.board: TensorBoardLog | None = None
        if self.options.tensorboard:
            self.board = TensorBoardLog(out / "tensorboard", None if at is None else at + 1)
            open_files.callback(self.board.close)

    def _after_step(self, step: StepResult) -> None:
        running = self.trainer.running
        # Steps count from 1 in the logs: a checkpoint "at step n" has the rows 1 to n.
        number = self.trainer.step_number
        self.step_log.add({"step": number, "epoch": step.epoch + 1, "lr": step.lr, "loss": step.loss})
        if self.board is not None:
            self.board.add({"loss/step": step.loss, "lr": step.lr}, number)
        self.progress.step(
            self._epoch_label(),
            running.steps,
            self.trainer.train_batches.steps_per_epoch,
            f"loss {running.mean_loss:.3f}  acc {running.accuracy:6.2%}  {running.images_per_second:,.0f} img/s",
            step.seconds,
        )
        every = self.options.checkpoint_every
        if every and number % every == 0 and running.steps < self.trainer.train_batches.steps_per_epoch:
            self._save(LAST)

    def _after_epoch(self) -> None:
        trainer, running, label = self.trainer, self.trainer.running, self._epoch_label()
        result = trainer.evaluate(self.test_batches)
        step = trainer.step_number
        row = _row(trainer.epoch + 1, step, running, result)
        self.epoch_log.add(row)
        self.summary.history.append(row)
        if self.board is not None:
            scalars = {
                "train_loss": "loss/train",
                "test_loss": "loss/test",
                "train_accuracy": "accuracy/train",
                "test_accuracy": "accuracy/test",
                "images_per_second": "images_per_second",
            }
            self.board.add({name: row[column] for column, name in scalars.items()}, step)
        self.progress.epoch(label, _epoch_text(row))
        trainer.next_epoch()
        self.summary.epochs, self.summary.test_accuracy = trainer.epoch, result.accuracy
        if result.accuracy > self.summary.best_accuracy:
            self.summary.best_accuracy = result.accuracy
            # The best one first: killed in between, the run repeats this epoch and writes both again.
            self._save(BEST, LAST)
        else:
            self._save(LAST)

    def _stopped(self) -> Summary:
        self.progress.clear()
        self._save(LAST)
        notice(f"stopped after step {self.trainer.step_number}; --resume --out {self.options.out} goes on from here")
        self.summary.stopped = True
        return self.summary

    def _epoch_label(self) -> str:
        width = len(str(self.options.epochs))
        return f"epoch {self.trainer.epoch + 1:{width}d}/{self.options.epochs}"

    def _save(self, *names: str) -> None:
        content = describe(self.options, self.dataset) | self.trainer.state()
        content["best_accuracy"] = self.summary.best_accuracy
        content["history"] = self.summary.history
        checkpoint.save(content, *(self.summary.out / name for name in names))


def describe(options: TrainOptions, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says about its network and data, enough to predict with it."""
    return {
        "fused_resnet": __version__,
        "options": plain(options),
        "network": options.model,
        "classes": list(dataset.classes),
        "preprocess": {
            "size": options.image_size(),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "resize_ratio": dataset.resize_ratio,
            "grayscale": dataset.grayscale,
        },
        "images": [len(dataset.train), len(dataset.test)],
        "threads": torch.get_num_threads(),
    }


def _restore(trainer: Trainer, summary: Summary, state: dict[str, Any], dataset: Dataset) -> None:
    if state["classes"] != list(dataset.classes) or state["images"] != [len(dataset.train), len(dataset.test)]:
        raise UserError(
            f"{dataset.name}: is not what the run began with (then {state['images'][0]} training images in "
            f"{len(state['classes'])} classes, now {len(dataset.train)} in {len(dataset.classes)})"
        )
    trainer.restore(state)
    summary.history = list(state["history"])
    summary.best_accuracy = state["best_accuracy"]
    summary.epochs = trainer.epoch
    if summary.history:
        summary.test_accuracy = summary.history[-1]["test_accuracy"]
    if state["threads"] != torch.get_num_threads():
        notice(
            f"the run began with {state['threads']} threads, now {torch.get_num_threads()}: losses may differ in their "
            f"last digits (--threads {state['threads']} repeats them exactly)"
        )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM let the current step finish; a second one ends the program at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set signal handlers
        return

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _row(epoch: int, step: int, running: Any, result: Evaluation) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": running.mean_loss,
        "train_accuracy": running.accuracy,
        "test_loss": result.loss,
        "test_accuracy": result.accuracy,
        "images_per_second": running.images_per_second,
        "seconds": running.seconds,
    }


def _epoch_text(row: dict[str, Any]) -> str:
    return (
        f"loss {row['train_loss']:.4f}  acc {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f}  test acc {row['test_accuracy']:.2%}  {row['images_per_second']:,.0f} img/s"
    )


def _headline(options: TrainOptions, dataset: Dataset, trainer: Trainer) -> str:
    on_gpu = trainer.device.type == "cuda"
    if options.stock:
        engine = "stock PyTorch (--stock)"
    elif not _extension.available() or (on_gpu and _extension.why_no_cuda(trainer.device.index) is not None):
        engine = "stock PyTorch"
    else:
        engine = "fused kernels"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    threads = torch.get_num_threads()
    return (
        f"{options.model} ({parameters:,} parameters) on {dataset.name}: {len(dataset.train):,} training and "
        f"{len(dataset.test):,} test images, {len(dataset.classes)} classes; {engine}, {trainer.device}, "
        f"{threads} thread{'s' if threads > 1 else ''}{', bf16' if options.bf16 else ', fp16' if options.fp16 else ''}"
    )
