"""A folder of images, one sub-folder per class, decoded with Pillow in a few threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_resnet.train.data.split import Augmentation, Dataset, Delivery, Split, stratified
from fused_resnet.train.errors import INSTALL, DataError, UserError
from fused_resnet.train.progress import notice

if TYPE_CHECKING:
    from PIL import Image

# The usual evaluation of ImageNet networks: resize the shorter side to 256, crop the central 224.
RESIZE_RATIO = 256 / 224
_TEST_NAMES = ("val", "valid", "validation", "test")
# Written by file managers beside the pictures; never meant as pictures.
_DEBRIS = ("thumbs.db", "desktop.ini")
_AUGMENT = Augmentation(flip=True, min_scale=0.25)


def load(root: Path, *, size: int, seed: int, test_fraction: float, skip_broken: bool, workers: int) -> Dataset | None:
    """The images below `root`, or None where there are no folders of files."""
    _pillow()
    pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="decode")
    train_root = root / "train"
    if train_root.is_dir():
        test_root = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
        classes = _class_names(train_root)
        train_paths, train_labels = _scan(train_root, classes, skip_broken, pool)
        if test_root is not None:
            unknown = [name for name in _class_names(test_root) if name not in classes]
            if unknown:
                raise DataError(f"{test_root / unknown[0]}: there is no class of this name in {train_root}")
            test_paths, test_labels = _scan(test_root, classes, skip_broken, pool)
            return _dataset(
                root,
                classes,
                ImageFolder(train_paths, train_labels, size, skip_broken, pool),
                ImageFolder(test_paths, test_labels, size, skip_broken, pool),
            )
    else:
        classes = _class_names(root)
        train_paths, train_labels = _scan(root, classes, skip_broken, pool)
    if not train_paths:
        return None
    train, test = stratified(torch.tensor(train_labels), test_fraction, seed)
    if test.numel() == 0:
        raise DataError(f"{root}: every class has a single image: none can be held out for testing")
    parts = [
        ImageFolder([train_paths[i] for i in part], [train_labels[i] for i in part], size, skip_broken, pool)
        for part in (train.tolist(), test.tolist())
    ]
    return _dataset(root, classes, *parts)


def _dataset(root: Path, classes: tuple[str, ...], train: Split, test: Split) -> Dataset:
    return Dataset(str(root), train, test, classes, augment=_AUGMENT, resize_ratio=RESIZE_RATIO)


class ImageFolder(Split):
    """Image files with labels; each is decoded when its batch comes."""

    def __init__(
        self, paths: list[Path], labels: list[int], size: int, skip_broken: bool, pool: ThreadPoolExecutor
    ) -> None:
        self.paths = paths
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.size = size
        self.skip_broken = skip_broken
        self._pool = pool
        self._warned: set[Path] = set()

    def start(self, indices: Tensor, draws: Tensor | None, min_scale: float | None) -> Delivery:
        paths = [self.paths[i] for i in indices.tolist()]
        crops: list[list[float] | None] = [None] * len(paths)
        if draws is not None and min_scale is not None:
            crops = list(draws.tolist())
        pending = [
            self._pool.submit(_decode_or_error, path, self.size, crop, min_scale or 1.0)
            for path, crop in zip(paths, crops, strict=True)
        ]

        def finish() -> tuple[Tensor, Tensor]:
            images, kept = [], []
            for position, future in enumerate(pending):
                result = future.result()
                if isinstance(result, Tensor):
                    images.append(result)
                    kept.append(position)
                elif not self.skip_broken:
                    raise _with_hint(result)
                elif paths[position] not in self._warned:
                    self._warned.add(paths[position])
                    notice(f"skipped {result}")
            if not images:
                return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
            return torch.stack(images), torch.tensor(kept)

        return finish


def decode(path: Path, size: int, *, ratio: float = RESIZE_RATIO, grayscale: bool = False) -> Tensor:
    """The central square of an image file, (3, size, size) uint8.

    Equal to resizing the shorter side to `size * ratio` and cropping the centre. With `grayscale` the colour is
    taken out, for networks that never saw any. Raises DataError, naming the file.
    """
    image = _decode(path, size, lambda width, height: _central(width, height, ratio))
    if grayscale:
        red, green, blue = image.float()
        image = (0.299 * red + 0.587 * green + 0.114 * blue).round_().to(torch.uint8).expand(3, size, size)
    return image


def _decode_or_error(path: Path, size: int, draws: list[float] | None, min_scale: float) -> Tensor | DataError:
    try:
        if draws is None:
            return decode(path, size)
        return _decode(path, size, lambda width, height: _random_crop(width, height, draws, min_scale))
    except DataError as error:
        return error


Box = tuple[float, float, float, float]


def _central(width: int, height: int, ratio: float) -> Box:
    side = min(width, height) / ratio
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_crop(width: int, height: int, draws: list[float], min_scale: float) -> Box:
    """Inception's crop: a random share of the area, a random aspect between 3:4 and 4:3, a random place."""
    _, _, _, area, aspect, down, right = draws
    scale = min_scale + (1 - min_scale) * area
    stretch = math.exp((2 * aspect - 1) * math.log(4 / 3))
    crop_width = min(math.sqrt(width * height * scale * stretch), width)
    crop_height = min(math.sqrt(width * height * scale / stretch), height)
    left, top = (width - crop_width) * right, (height - crop_height) * down
    return left, top, left + crop_width, top + crop_height


# At what is damaged, each in its own way: AVIF's a RuntimeError, for one.
_DECODERS_RAISE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, ArithmeticError)


def _decode(path: Path, size: int, crop: Callable[[int, int], Box]) -> Tensor:
    image_module = _pillow()
    try:
        with image_module.open(path) as image:
            # JPEGs can be decoded at 1/2, 1/4 or 1/8 of their size for a fraction of the cost.
            width, height = image.size
            left, top, right, bottom = crop(width, height)
            shrink = min(right - left, bottom - top) / size
            if shrink >= 2:
                image.draft("RGB", (int(width / shrink), int(height / shrink)))
            fx, fy = image.size[0] / width, image.size[1] / height
            box = (left * fx, top * fy, min(right * fx, image.size[0]), min(bottom * fy, image.size[1]))
            square = _rgb(image).resize((size, size), image_module.Resampling.BILINEAR, box=box)
    except (*_DECODERS_RAISE, image_module.DecompressionBombError) as error:
        raise _broken(path, error) from None
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # 16-bit grey: converting straight to RGB would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _broken(path: Path, error: BaseException) -> DataError:
    reason = str(error).replace(repr(str(path)), "").replace(str(path), "").strip() or type(error).__name__
    return DataError(f"{path}: a broken or non-image file ({reason})")


def _with_hint(error: DataError) -> DataError:
    return DataError(f"{error}; --skip-broken leaves such files out")


def _class_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def image_files(folder: Path) -> Iterable[Path]:
    """All files below `folder` in a fixed order, without what is hidden."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _DEBRIS:
                yield Path(parent, name)


def _scan(
    root: Path, classes: tuple[str, ...], skip_broken: bool, pool: ThreadPoolExecutor
) -> tuple[list[Path], list[int]]:
    """All image files with their labels, in a fixed order. Every header is read, so that a text file among the images
    is found now and not after an hour."""
    candidates = [(path, label) for label, name in enumerate(classes) for path in image_files(root / name)]
    paths, labels = [], []
    for (path, label), error in zip(candidates, pool.map(_header_error, (p for p, _ in candidates)), strict=True):
        if error is None:
            paths.append(path)
            labels.append(label)
        elif not skip_broken:
            raise _with_hint(error)
        else:
            notice(f"skipped {error}")
    if candidates and not paths:
        raise DataError(f"{root}: holds {len(candidates)} files, none of them an image")
    return paths, labels


def _header_error(path: Path) -> DataError | None:
    image_module = _pillow()
    try:
        with image_module.open(path):
            return None
    except (OSError, SyntaxError, ValueError, EOFError, image_module.DecompressionBombError) as error:
        return _broken(path, error)


def _pillow():  # type: ignore[no-untyped-def]  # returns the module PIL.Image
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"reading image files needs Pillow: {INSTALL}") from None
    return Image
