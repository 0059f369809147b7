"""CIFAR-10 and CIFAR-100, the binary and the python version (format: https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_resnet.train.data.split import Augmentation, Dataset, InMemory
from fused_resnet.train.errors import INSTALL, DataError

_PIXELS = 3 * 32 * 32
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_AUGMENT = Augmentation(shift=4, flip=True)


def load(folder: Path, *, size: int) -> Dataset | None:
    """The set in `folder`, or None where there are no CIFAR files."""
    for suffix, read in ((".bin", _read_binary), ("", _read_python)):
        batches = sorted(folder.glob(f"data_batch_[0-9]{suffix}"))
        if batches:
            return _dataset(folder, "CIFAR-10", batches, folder / f"test_batch{suffix}", read, 10, size)
        train, test = folder / f"train{suffix}", folder / f"test{suffix}"
        # A file called "train" alone says little: CIFAR-100 always comes with its names.
        if train.is_file() and (suffix or (folder / "meta").is_file()):
            return _dataset(folder, "CIFAR-100", [train], test, read, 100, size)
    return None


def _dataset(folder: Path, name: str, train: list[Path], test: Path, read: Any, count: int, size: int) -> Dataset:
    if not test.is_file():
        raise DataError(f"{test}: is missing beside {train[0].name}")
    parts = [read(path, count) for path in train]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    test_images, test_labels = read(test, count)
    return Dataset(
        name=name,
        train=InMemory(images, labels, size),
        test=InMemory(test_images, test_labels, size),
        classes=_class_names(folder, count),
        augment=_AUGMENT,
    ).measured()


def _read_binary(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Records of (CIFAR-10) label, pixels or (CIFAR-100) coarse label, fine label, pixels, one byte each."""
    header = 1 if count == 10 else 2
    data = _bytes(path)
    if not data or len(data) % (header + _PIXELS):
        raise DataError(f"{path}: {len(data)} bytes are not a whole number of {header + _PIXELS}-byte CIFAR records")
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, header + _PIXELS)
    return records[:, header:].reshape(-1, 3, 32, 32).contiguous(), records[:, header - 1].long()


def _read_python(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """A pickled dictionary with `data` (N, 3072) uint8 and `labels` or `fine_labels`."""
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a CIFAR batch (expected a dictionary)")
    labels = content.get(b"labels" if count == 10 else b"fine_labels")
    data = content.get(b"data")
    if labels is None or data is None:
        raise DataError(f"{path}: not a CIFAR-{count} batch (no data or no labels in it)")
    images = torch.as_tensor(data, dtype=torch.uint8)
    if images.dim() != 2 or images.shape[1] != _PIXELS:
        raise DataError(f"{path}: expected images of {_PIXELS} bytes, found shape {tuple(images.shape)}")
    return images.reshape(-1, 3, 32, 32).contiguous(), torch.as_tensor(labels, dtype=torch.int64)


class _Unpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values only: a pickle could otherwise run any code."""

    _ALLOWED = frozenset(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a CIFAR batch")

    @classmethod
    def read(cls, data: bytes) -> Any:
        content = cls(io.BytesIO(data), encoding="bytes").load()
        if isinstance(content, dict):
            # Batches written by Python 2 have bytes for keys, later ones text.
            return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
        return content


def _unpickle(path: Path) -> Any:
    try:
        return _Unpickler.read(_bytes(path))
    # Broken bytes make the unpickler raise nearly anything.
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: not a readable CIFAR python batch ({error})") from None
    except ImportError as error:
        raise DataError(f"{path}: CIFAR python batches need numpy ({error}): {INSTALL}") from None


def _class_names(folder: Path, count: int) -> tuple[str, ...]:
    text = folder / ("batches.meta.txt" if count == 10 else "fine_label_names.txt")
    names: list[str] = []
    if text.is_file():
        names = text.read_text(encoding="utf-8", errors="replace").split()
    else:
        meta = folder / ("batches.meta" if count == 10 else "meta")
        if meta.is_file():
            content = _unpickle(meta)
            key = b"label_names" if count == 10 else b"fine_label_names"
            found = content.get(key, []) if isinstance(content, dict) else []
            names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
    if len(names) == count:
        return tuple(names)
    return _CIFAR10 if count == 10 else tuple(str(label) for label in range(count))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
