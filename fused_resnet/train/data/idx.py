"""MNIST and Fashion-MNIST in their own IDX files, plain or gzipped (format: http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.train.data.split import Augmentation, Dataset, InMemory
from fused_resnet.train.errors import DataError

_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_FASHION = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_UNSIGNED_BYTE = 8


def load(folder: Path, *, size: int) -> Dataset | None:
    """The set in `folder`, or None where there are no IDX files."""
    files = [_find(folder, stem) for stem in _STEMS]
    if all(file is None for file in files):
        return None
    for stem, file in zip(_STEMS, files, strict=True):
        if file is None:
            raise DataError(f"{folder}: {stem}-idx{3 if 'images' in stem else 1}-ubyte[.gz] is missing")
    train_images, train_labels, test_images, test_labels = (read_idx(file) for file in files if file is not None)
    for images in (train_images, test_images):
        if images.dim() != 3:
            raise DataError(f"{folder}: images must have 3 dimensions, found {images.dim()}")
    fashion = "fashion" in str(folder.resolve()).lower()
    count = int(max(train_labels.max(), test_labels.max())) + 1 if train_labels.numel() and test_labels.numel() else 0
    classes = _FASHION if fashion and count <= len(_FASHION) else tuple(str(label) for label in range(max(count, 10)))
    return Dataset(
        name="Fashion-MNIST" if fashion else "MNIST",
        train=InMemory(train_images.unsqueeze(1), train_labels, size),
        test=InMemory(test_images.unsqueeze(1), test_labels, size),
        classes=classes,
        # A mirrored shirt is a shirt, a mirrored 2 is not a 2.
        augment=Augmentation(shift=2, flip=fashion),
        grayscale=True,
    ).measured()


def read_idx(path: Path) -> Tensor:
    """One IDX file of unsigned bytes: big-endian magic (0, 0, type, rank), the sizes, then the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE or not 1 <= data[3] <= 3:
        raise DataError(f"{path}: not an IDX file of unsigned bytes (it begins with {data[:4].hex() or 'nothing'})")
    rank = data[3]
    start = 4 + 4 * rank
    if len(data) < start:
        raise DataError(f"{path}: its header is cut off")
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    if len(data) - start != math.prod(sizes):
        raise DataError(f"{path}: sizes {sizes} need {math.prod(sizes)} bytes, found {len(data) - start}")
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).reshape(sizes)


def _find(folder: Path, stem: str) -> Path | None:
    rank = 3 if "images" in stem else 1
    # Some mirrors of the files write a dot for the second hyphen.
    for name in (f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte"):
        for suffix in ("", ".gz"):
            if (folder / (name + suffix)).is_file():
                return folder / (name + suffix)
    return None
