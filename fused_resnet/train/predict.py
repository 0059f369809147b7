"""Classifies image files with a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet.train import trained
from fused_resnet.train.batches import to_device
from fused_resnet.train.data.folder import decode, image_files
from fused_resnet.train.errors import CheckpointError, DataError, OptionError
from fused_resnet.train.transforms import normalise


@dataclass(frozen=True)
class Prediction:
    """One image: its most probable classes with their probabilities, best first; or why it could not be read."""

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        if self.error is not None:
            return {"file": str(self.path), "error": self.error}
        return {"file": str(self.path), "top": [{"class": name, "probability": p} for name, p in self.top]}


class Classifier:
    """A trained network, read from a checkpoint of `fused-resnet train` or a file of `fused-resnet export`.

    On a CPU it is folded for inference, see `fused_resnet.optimize_for_inference`.

    Args:
        path: the file, or the folder of a run (its best.pt is taken).
        device: where to compute.

    Raises:
        CheckpointError: it is missing, damaged, does not fit its own network, or says nothing of classes.
    """

    def __init__(self, path: Path, *, device: torch.device | None = None) -> None:
        self.path = path
        self.device = device or torch.device("cpu")
        self.model, self.classes, self.preprocess = trained.for_images(path, self.device)

    def __call__(self, paths: Sequence[Path], *, top: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
        """Predictions for `paths`, in their order."""
        for at in range(0, len(paths), batch_size):
            yield from self._batch(paths[at : at + batch_size], min(top, len(self.classes)))

    @torch.no_grad()
    def _batch(self, paths: Sequence[Path], top: int) -> Iterator[Prediction]:
        how = self.preprocess
        images, errors = [], {}
        for path in paths:
            try:
                images.append(decode(path, how["size"], ratio=how["resize_ratio"], grayscale=how["grayscale"]))
            except DataError as error:
                errors[path] = str(error)
        rows: Iterator[Prediction] = iter(())
        if images:
            logits = self.model(to_device(normalise(torch.stack(images), how["mean"], how["std"]), self.device))
            if logits.shape[1:] != (len(self.classes),):
                raise CheckpointError(
                    f"{self.path}: has {len(self.classes)} classes, answers {tuple(logits.shape[1:])}"
                )
            best = logits.float().softmax(1).topk(top)
            good = [path for path in paths if path not in errors]
            rows = iter(
                [
                    Prediction(path, tuple((self.classes[i], p) for i, p in zip(labels, values, strict=True)))
                    for path, labels, values in zip(good, best.indices.tolist(), best.values.tolist(), strict=True)
                ]
            )
        for path in paths:
            yield Prediction(path, error=errors[path]) if path in errors else next(rows)


def collect(names: Iterable[str]) -> list[Path]:
    """The files named, and all files in the folders named."""
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if os.path.isdir(path):  # of a name that no system takes, Path would raise
            found = list(image_files(path))
            if not found:
                raise OptionError(f"{name}: the folder is empty")
            paths += found
        elif os.path.exists(path):
            paths.append(path)
        else:
            raise OptionError(f"{name}: no such file")
    return paths


def table(predictions: Sequence[Prediction]) -> str:
    """One line per image: the file, then its classes with their probabilities."""
    width = max((len(str(p.path)) for p in predictions), default=0)
    lines = []
    for p in predictions:
        if p.error is None:
            lines.append(f"{p.path!s:{width}}  " + "  ".join(f"{name} {value:.1%}" for name, value in p.top))
        else:
            lines.append(p.error)
    return "\n".join(lines)
