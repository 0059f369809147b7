"""One network in training: a step, an epoch, an evaluation. Knows nothing of files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_resnet.nn import stock
from fused_resnet.train.batches import Batch, TestBatches, TrainBatches, to_device
from fused_resnet.train.errors import DivergedError
from fused_resnet.train.options import TrainOptions
from fused_resnet.train.schedule import Schedule


@dataclass
class Running:
    """Sums over the steps of the current epoch, as plain numbers, so that a checkpoint can hold them."""

    steps: int = 0
    images: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.images if self.images else math.nan

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class StepResult:
    step: int
    epoch: int
    lr: float
    loss: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over a split; the predicted class and its probability, (N,); seconds it took.

    An image that could not be read has the prediction -1 and does not count.
    """

    loss: float
    accuracy: float
    predictions: Tensor
    confidences: Tensor
    seconds: float


class Trainer:
    """SGD on `model`: `step()` for `step()`, resumable at every one of them.

    Args:
        model: the network; moved to `device`.
        options: what to do. `options.stock` turns the fused kernels off for this trainer alone.
        train: the training batches.
        device: where to compute.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, train: TrainBatches, device: torch.device) -> None:
        self.options = options
        self.train_batches = train
        self.device = device
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.fp16)
        per_epoch = train.steps_per_epoch
        self.schedule = Schedule(
            options.schedule,
            options.lr,
            total_steps=options.epochs * per_epoch,
            warmup_steps=round(options.warmup_epochs * per_epoch),
            milestones=[round(epoch * per_epoch) for epoch in options.milestone_epochs()],
            gamma=options.gamma,
        )
        self.epoch = 0
        self.running = Running()

    @property
    def step_number(self) -> int:
        """Steps done so far."""
        return self.epoch * self.train_batches.steps_per_epoch + self.running.steps

    def steps(self) -> Iterator[StepResult]:
        """The rest of the current epoch, step by step. `epoch` and `running` are up to date at each yield."""
        batches = self.train_batches.epoch(self.epoch, start=self.running.steps)
        while True:
            # Waiting for images counts as part of the step; what the caller does between steps does not.
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield self._step(batch, start)

    def next_epoch(self) -> None:
        """Closes a finished epoch."""
        self.epoch += 1
        self.running = Running()

    def _step(self, batch: Batch, start: float) -> StepResult:
        lr = self.schedule(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        images, labels = to_device(batch.images, self.device), to_device(batch.labels, self.device)
        loss_value, correct = math.nan, 0
        # A batch can only be empty where every one of its files is broken and skipped: a step without a gradient.
        if labels.numel():
            with self._arithmetic():
                logits = self.model(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.options.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()  # the scaler does something with --fp16 only
            loss_value = loss.item()
            if not math.isfinite(loss_value):
                raise DivergedError(
                    f"the loss became {loss_value} at step {self.step_number + 1}: "
                    "try a lower --lr or a longer --warmup-epochs"
                )
            self.scaler.step(self.optimizer)
            self.scaler.update()
            correct = int((logits.argmax(1) == labels).sum())
        seconds = time.perf_counter() - start
        done = StepResult(self.step_number, self.epoch, lr, loss_value, labels.numel(), seconds)
        running = self.running
        running.steps += 1
        running.images += labels.numel()
        running.loss += loss_value * labels.numel() if labels.numel() else 0.0
        running.correct += correct
        running.seconds += seconds
        return done

    @torch.no_grad()
    def evaluate(self, batches: TestBatches, *, after_batch: Callable[[], None] | None = None) -> Evaluation:
        """Loss (without label smoothing) and accuracy over all of `batches`."""
        self.model.eval()
        start = time.perf_counter()
        predictions = torch.full((len(batches.split),), -1)
        confidences = torch.zeros(len(batches.split))
        loss_sum, count, correct = 0.0, 0, 0
        for batch in batches:
            if batch.labels.numel() == 0:
                continue
            with self._arithmetic():
                logits = self.model(to_device(batch.images, self.device)).float().cpu()
            loss_sum += F.cross_entropy(logits, batch.labels, reduction="sum").item()
            best = logits.softmax(1).max(1)
            predictions[batch.indices], confidences[batch.indices] = best.indices, best.values
            count += batch.labels.numel()
            correct += int((best.indices == batch.labels).sum())
            if after_batch is not None:
                after_batch()
        return Evaluation(
            loss_sum / count if count else math.nan,
            correct / count if count else math.nan,
            predictions,
            confidences,
            time.perf_counter() - start,
        )

    def _arithmetic(self) -> AbstractContextManager[Any]:
        contexts = ExitStack()
        if self.options.stock:
            contexts.enter_context(stock())
        if self.options.bf16 or self.options.fp16:
            dtype = torch.bfloat16 if self.options.bf16 else torch.float16
            contexts.enter_context(torch.autocast(self.device.type, dtype))
        return contexts

    def state(self) -> dict[str, Any]:
        """Everything that decides what the following steps compute."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "running": vars(self.running).copy(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.running = Running(**state["running"])
        torch.set_rng_state(state["rng"])
