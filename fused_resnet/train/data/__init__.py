"""Data sources: a folder of images by class, MNIST's and CIFAR's own files, scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

from fused_resnet.train.data import cifar, digits, folder, idx
from fused_resnet.train.data.split import Augmentation, Dataset, InMemory, Split
from fused_resnet.train.errors import DataError, OptionError

__all__ = ["Augmentation", "Dataset", "InMemory", "Split", "open_dataset"]


def open_dataset(
    path: str, *, size: int, seed: int = 0, test_fraction: float = 0.1, skip_broken: bool = False, workers: int = 2
) -> Dataset:
    """Opens whatever lies at `path`.

    Args:
        path: a folder, or "digits" for the 1,797 handwritten digits of scikit-learn.
        size: side of the square images to deliver.
        seed, test_fraction: how to hold out test images where the data have no test set of their own.
        skip_broken: leave out files that are no images, or broken ones, instead of stopping.
        workers: threads that decode a folder's images.

    Raises:
        OptionError: there is nothing at `path`.
        DataError: what is there cannot be read.
    """
    root = Path(path)
    if path == "digits" and not root.exists():
        return digits.load(size=size).check()
    if not root.exists():
        raise OptionError(f"--data {path}: no such folder (or say 'digits' for scikit-learn's handwritten digits)")
    if not root.is_dir():
        raise OptionError(f"--data {path}: not a folder")
    # The file formats of known sets first: their folders could otherwise be taken for folders of classes.
    for place in (root, *_folders(root, "*"), *_folders(root, "*/*")):
        for reader in (idx, cifar):
            found: Dataset | None = reader.load(place, size=size)  # type: ignore[attr-defined]
            if found is not None:
                return found.check()
    dataset = folder.load(
        root, size=size, seed=seed, test_fraction=test_fraction, skip_broken=skip_broken, workers=workers
    )
    if dataset is None:
        raise DataError(
            f"{path}: nothing to train on. Expected one folder of images per class (or train/ and val/ holding such), "
            "MNIST files (train-images-idx3-ubyte[.gz]) or CIFAR files (data_batch_1[.bin], train[.bin])"
        )
    return dataset.check()


def _folders(root: Path, pattern: str) -> list[Path]:
    return sorted(path for path in root.glob(pattern) if path.is_dir())
