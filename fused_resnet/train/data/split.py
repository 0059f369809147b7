"""What every data source delivers: splits, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.train.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        shift: largest shift in pixels, up, down, left and right; what moves in is black (pad, then crop).
        flip: mirror half of the images.
        min_scale: smallest share of a photograph's area that a random crop keeps; None: no random crop.
    """

    shift: int = 0
    flip: bool = False
    min_scale: float | None = None


# Delivers a batch that was begun: images (B, 1 or 3, size, size) uint8, and the positions of these among the indices
# asked for (all of them, unless broken files are skipped).
Delivery = Callable[[], tuple[Tensor, Tensor]]


class Split(ABC):
    """Images with labels. `labels` is (N,) int64, `size` the side of the square images it delivers."""

    labels: Tensor
    size: int

    def __len__(self) -> int:
        return int(self.labels.numel())

    @abstractmethod
    def start(self, indices: Tensor, draws: Tensor | None, min_scale: float | None) -> Delivery:
        """Begins to load a batch, and returns what delivers it.

        Args:
            indices: (B,) int64, which images.
            draws: (B, DRAWS) numbers in [0, 1) that decide each image's random crop; None: no random crop.
            min_scale: smallest share of the area that such a crop keeps; None: no random crop.
        """


class InMemory(Split):
    """A small set that is decoded once: images (N, 1 or 3, H, W) uint8, resized here to `size`."""

    def __init__(self, images: Tensor, labels: Tensor, size: int | None = None) -> None:
        if images.shape[0] != labels.numel():
            raise DataError(f"{images.shape[0]} images but {labels.numel()} labels")
        self.images = images if size is None else resize(images, size)
        self.labels = labels.to(torch.int64)
        self.size = self.images.shape[-1]

    def start(self, indices: Tensor, draws: Tensor | None = None, min_scale: float | None = None) -> Delivery:
        del draws, min_scale  # these images are too small for a random crop: shifts do its work
        return lambda: (self.images[indices], torch.arange(indices.numel()))


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear (anti-aliased when shrinking) resize of uint8 images (N, C, H, W) to (N, C, size, size)."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    # In chunks: the fp32 copy of a large set would need four times its memory.
    chunks = [
        F.interpolate(c.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)
        for c in images.split(1024)
    ]
    return torch.cat(chunks)


@dataclass(frozen=True)
class Dataset:
    """A training split, a test split, and what a model trained on them must know.

    Attributes:
        name: what was found, for people.
        train, test: the two splits.
        classes: class names, by label.
        mean, std: per channel (R, G, B), of values in [0, 1].
        augment: the augmentation that suits these data, unless the user says otherwise.
        resize_ratio: how much larger than the crop an evaluated image is made (1: the whole image is seen).
        grayscale: whether the images have one channel (they are shown to the network as three equal ones).
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    augment: Augmentation = field(default_factory=Augmentation)
    resize_ratio: float = 1.0
    grayscale: bool = False

    def check(self) -> Dataset:
        """Raises DataError when there is nothing to train on, or a label without a class."""
        for name, split in (("training", self.train), ("test", self.test)):
            if len(split) == 0:
                raise DataError(f"{self.name}: no {name} images")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"{self.name}: {name} label {high if low >= 0 else low} is not one of the "
                    f"{len(self.classes)} classes"
                )
        return self

    def measured(self) -> Dataset:
        """The same data with the mean and standard deviation of the training images."""
        if not isinstance(self.train, InMemory):
            return self
        total = torch.zeros(3, dtype=torch.float64)
        squares = torch.zeros(3, dtype=torch.float64)
        pixels = 0
        for chunk in self.train.images.split(1024):
            x = chunk.double().div_(255).flatten(2)
            total += x.sum((0, 2))
            squares += x.square().sum((0, 2))
            pixels += x.shape[0] * x.shape[2]
        mean = total / pixels
        # A set of one flat colour has no spread: dividing by the smallest step of a byte keeps the numbers finite.
        std = (squares / pixels - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def stratified(labels: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits positions into (train, test), the same share of every class, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(members.numel(), generator=generator)]
        held_out = min(max(round(members.numel() * test_fraction), 1), members.numel() - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
