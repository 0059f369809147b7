"""Two trainings in lock-step, one fused, one stock: same seed, same first weights, same images in the same order.

They take turns step by step, and swap who goes first, so that a slow moment of the machine slows both alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fused_resnet.nn import explain
from fused_resnet.nn.explain import Explanation
from fused_resnet.train.batches import TestBatches
from fused_resnet.train.data import Dataset
from fused_resnet.train.options import TrainOptions
from fused_resnet.train.progress import Progress, notice
from fused_resnet.train.run import make_trainer, open_data
from fused_resnet.train.trainer import Evaluation, StepResult, Trainer

MODEL = "cifar.resnet20"
EPOCHS = 10


def options(*, epochs: int = EPOCHS, seed: int = 0) -> TrainOptions:
    """How the demo trains. Found by trial: reaches 98.5 to 99.5% on the test digits for every seed tried."""
    return TrainOptions(
        model=MODEL,
        data="digits",
        epochs=epochs,
        batch_size=64,
        lr=0.1,
        nesterov=True,
        weight_decay=5e-4,
        warmup_epochs=1 if epochs > 1 else 0,
        seed=seed,
    )


@dataclass
class Side:
    """One of the two trainings, and what became of it."""

    name: str
    trainer: Trainer
    step_losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    images_per_second: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    options: TrainOptions
    dataset: Dataset
    fused: Side
    stock: Side
    explanation: Explanation


def train_both(options: TrainOptions) -> Outcome:
    """Trains both sides to the end."""
    dataset = open_data(options)
    fused, test_batches = _side("fused", options, dataset)
    stock, _ = _side("stock", replace(options, stock=True), dataset)
    sides = (fused, stock)
    notice(
        f"{options.model} on {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images, "
        f"{options.epochs} epochs, fused and stock PyTorch taking turns step by step"
    )
    per_epoch = fused.trainer.train_batches.steps_per_epoch
    progress = Progress(options.epochs * per_epoch)
    for epoch in range(options.epochs):
        label = f"epoch {epoch + 1:2d}/{options.epochs}"
        turns = [side.trainer.steps() for side in sides]
        for step in range(per_epoch):
            order = (0, 1) if step % 2 == 0 else (1, 0)
            seconds = 0.0
            for i in order:
                result = next(turns[i])
                _note(sides[i], result)
                seconds += result.seconds
            progress.step(label, step + 1, per_epoch, _both(sides), seconds)
        for side in sides:
            _close_epoch(side, test_batches)
        progress.epoch(label, _both_tested(sides))
    example = next(iter(test_batches)).images[:2]
    return Outcome(options, dataset, fused, stock, explain(fused.trainer.model, example))


def _side(name: str, options: TrainOptions, dataset: Dataset) -> tuple[Side, TestBatches]:
    trainer, test_batches = make_trainer(options, dataset)
    return Side(name, trainer), test_batches


def _note(side: Side, result: StepResult) -> None:
    side.step_losses.append(result.loss)
    side.step_seconds.append(result.seconds)


def _close_epoch(side: Side, test_batches: TestBatches) -> None:
    running = side.trainer.running
    side.train_loss.append(running.mean_loss)
    side.train_accuracy.append(running.accuracy)
    side.images_per_second.append(running.images_per_second)
    side.evaluations.append(side.trainer.evaluate(test_batches))
    side.trainer.next_epoch()


def _both(sides: tuple[Side, Side]) -> str:
    return " | ".join(
        f"{side.name} loss {r.mean_loss:.3f} acc {r.accuracy:5.1%} {r.images_per_second:,.0f} img/s"
        for side in sides
        for r in (side.trainer.running,)
    )


def _both_tested(sides: tuple[Side, Side]) -> str:
    return " | ".join(
        f"{side.name} loss {side.train_loss[-1]:.4f} test acc {side.evaluations[-1].accuracy:6.2%} "
        f"{side.images_per_second[-1]:,.0f} img/s"
        for side in sides
    )
