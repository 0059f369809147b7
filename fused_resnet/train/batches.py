"""The order of the images: a function of seed, epoch and step alone, so that a resumed run sees what it would have."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_resnet.train.data.split import Augmentation, Split
from fused_resnet.train.transforms import draw, normalise, seed_of, shift_and_flip

# Batches being decoded while the network works on the current one.
_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, S, S) fp32, labels (B,), and their positions (B,) in the split."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class TrainBatches:
    """Shuffled, augmented batches of one size; the few images left over at the end of an epoch wait for the next."""

    split: Split
    batch_size: int
    seed: int
    augment: Augmentation
    mean: Sequence[float]
    std: Sequence[float]
    channels_last: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return len(self.split) // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (from 0), beginning with number `start`."""
        order = torch.randperm(
            len(self.split), generator=torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        )

        def begin(step: int) -> Callable[[], Batch]:
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            draws = draw(self.batch_size, self.seed, epoch, step)
            finish = self.split.start(indices, draws, self.augment.min_scale)

            def complete() -> Batch:
                images, kept = finish()
                images = shift_and_flip(images, draws[kept], self.augment)
                return _batch(self.split, images, indices[kept], self.mean, self.std, self.channels_last)

            return complete

        return _ahead(begin, range(start, self.steps_per_epoch))


@dataclass(frozen=True)
class TestBatches:
    """All images of a split, in order, as they are."""

    # Not a test case, whatever its name says to pytest.
    __test__ = False

    split: Split
    batch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    channels_last: bool = True

    def __iter__(self) -> Iterator[Batch]:
        def begin(step: int) -> Callable[[], Batch]:
            indices = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.split)))
            finish = self.split.start(indices, None, None)

            def complete() -> Batch:
                images, kept = finish()
                return _batch(self.split, images, indices[kept], self.mean, self.std, self.channels_last)

            return complete

        return _ahead(begin, range(-(-len(self.split) // self.batch_size)))


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; a GPU's copy runs behind what the host does next."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _batch(
    split: Split, images: Tensor, indices: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool
) -> Batch:
    return Batch(normalise(images, mean, std, channels_last=channels_last), split.labels[indices], indices)


def _ahead(begin: Callable[[int], Callable[[], Batch]], steps: range) -> Iterator[Batch]:
    waiting: deque[Callable[[], Batch]] = deque()
    for step in steps:
        waiting.append(begin(step))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
