"""The 1,797 real handwritten digits (8x8 pixels, 17 shades) that ship inside scikit-learn."""

from __future__ import annotations

import torch

from fused_resnet.train.data.split import Augmentation, Dataset, InMemory, stratified
from fused_resnet.train.errors import INSTALL, DataError

_LARGEST_SHADE = 16.0
_TEST_FRACTION = 0.2
# The split belongs to the data, not to a run: every run is tested on the same digits.
_SPLIT_SEED = 1797


def load(*, size: int) -> Dataset:
    """The digits, split four to one, the same share of each digit in both parts."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"the digits need scikit-learn: {INSTALL}") from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul_(255 / _LARGEST_SHADE).round_().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = stratified(labels, _TEST_FRACTION, _SPLIT_SEED)
    return Dataset(
        name="handwritten digits (scikit-learn)",
        train=InMemory(images[train], labels[train], size),
        test=InMemory(images[test], labels[test], size),
        classes=tuple(str(digit) for digit in range(10)),
        augment=Augmentation(shift=max(1, size // 10)),
        grayscale=True,
    ).measured()
