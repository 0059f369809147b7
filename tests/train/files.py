"""Tiny data sets in the formats that training reads, made on the spot."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def random_images(*shape: int, seed: int = 0) -> Tensor:
    """Bytes of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def cycle(count: int, classes: int) -> Tensor:
    """Labels 0, 1, 2, ... in turn."""
    return torch.arange(count) % classes


def idx_bytes(values: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + values.to(torch.uint8).numpy().tobytes()


def write_idx(folder: Path, *, train: int = 24, test: int = 10, side: int = 10, compress: bool = False) -> Path:
    """MNIST's four files; bright squares, whose place tells the class, so that a network can learn them."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count, seed in (("train", train, 1), ("t10k", test, 2)):
        images, labels = random_images(count, side, side, seed=seed) // 4, cycle(count, 10)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[label * side // 10, :] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx_bytes(values)
            name = f"{stem}-{kind}-ubyte" + (".gz" if compress else "")
            (folder / name).write_bytes(gzip.compress(data) if compress else data)
    return folder


def write_cifar_binary(folder: Path, *, classes: int = 10, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    for seed, name in enumerate(names):
        labels = cycle(count, classes).to(torch.uint8).unsqueeze(1)
        coarse = [torch.full_like(labels, 99)] if classes == 100 else []
        records = torch.cat([*coarse, labels, random_images(count, 3072, seed=seed)], 1)
        (folder / name).write_bytes(records.numpy().tobytes())
    return folder


def write_cifar_python(folder: Path, *, classes: int = 10, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ten = classes == 10
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    for seed, name in enumerate(names):
        content = {
            b"data": random_images(count, 3072, seed=seed).numpy().astype(np.uint8),
            b"labels" if ten else b"fine_labels": cycle(count, classes).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"label_names" if ten else b"fine_label_names": [f"name{i}".encode() for i in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def write_photo(path: Path, *, width: int = 40, height: int = 30, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


def write_photos(folder: Path, classes: dict[str, tuple[int, int, int]], *, count: int = 6) -> Path:
    """One folder of plainly coloured photographs per class, half JPEG, half PNG."""
    for name, colour in classes.items():
        for i in range(count):
            write_photo(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}", width=30 + i, colour=colour)
    return folder


RED_AND_BLUE = {"blue": (20, 20, 220), "red": (220, 20, 20)}
