"""Checkpoints and data folders that are missing, damaged or of something else."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.models.weights import load_weights
from tests.bad_input.registry import BadCase, Trial, add


def _weights(
    label: str, raises: str, words: tuple[str, ...], weights: Callable[[dict[str, Tensor], Path], Any]
) -> None:
    """Loads weights into a model, which must stay as it is."""

    def build() -> Trial:
        model = fr.models.cifar.resnet20(num_classes=3)
        state = {
            name: torch.randn_like(v) if v.is_floating_point() else v + 1 for name, v in model.state_dict().items()
        }
        source = weights(state, Path(tempfile.mkdtemp()))
        return Trial(lambda: load_weights(model, source), {"model": model})

    add(BadCase(f"weights: {label}", build, (raises,), words, needs_extension=False))


def _without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def _write(folder: Path, content: bytes) -> Path:
    path = folder / "weights.pth"
    path.write_bytes(content)
    return path


def _saved(folder: Path, content: object) -> bytes:
    path = folder / "whole.pth"
    torch.save(content, path)
    return path.read_bytes()


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code in a checkpoint ran",))


_weights("a missing key", "RuntimeError", ("missing", "fc.bias"), lambda s, _: _without(s, "fc.bias"))
_weights("an extra key", "RuntimeError", ("unexpected", "fc.extra"), lambda s, _: {**s, "fc.extra": torch.zeros(1)})
_weights(
    "a misshapen key",
    "RuntimeError",
    ("fc.weight", "expected", "(3, 64)", "got", "(1000, 64)"),
    lambda s, _: {**s, "fc.weight": torch.zeros(1000, 64)},
)
_weights("a value that is no tensor", "RuntimeError", ("fc.weight", "tensor"), lambda s, _: {**s, "fc.weight": 1.0})
_weights(
    "all three at once",
    "RuntimeError",
    ("missing", "conv1.weight", "unexpected", "stem.weight", "fc.bias"),
    lambda s, _: {**_without(s, "conv1.weight"), "stem.weight": torch.zeros(1), "fc.bias": torch.zeros(7)},
)
_weights("an empty state_dict", "RuntimeError", ("missing",), lambda _, __: {})
_weights("an integer", "TypeError", ("weights", "int"), lambda _, __: 7)
_weights("a path that is not there", "FileNotFoundError", ("nowhere.pth",), lambda _, d: str(d / "nowhere.pth"))
_weights("a folder", "RuntimeError", ("weights",), lambda _, d: d)
_weights("an empty file", "RuntimeError", ("weights.pth",), lambda _, d: _write(d, b""))
_weights("random bytes", "RuntimeError", ("weights.pth",), lambda _, d: _write(d, bytes(range(256)) * 40))
_weights("a text file", "RuntimeError", ("weights.pth",), lambda _, d: _write(d, b"<html>404 not found</html>"))
_weights("a file cut short", "RuntimeError", ("weights.pth",), lambda s, d: _write(d, _saved(d, s)[: 512 * 1024]))
_weights("a pickled list", "RuntimeError", ("weights.pth",), lambda _, d: _write(d, _saved(d, [1, 2])))
_weights(
    "code in the file",
    "RuntimeError",
    ("weights.pth",),
    lambda _, d: _write(d, pickle.dumps({"fc.weight": _Harmful()})),
)


def _command(label: str, words: tuple[str, ...], arguments: Callable[[Path], list[str]]) -> None:
    """A command that must end with one line and a code that is not 0: its UserError or SystemExit carry both."""

    def build() -> Trial:
        from fused_resnet import cli

        folder = Path(tempfile.mkdtemp())
        line = [*arguments(folder), "--epochs", "1", "--out", str(folder / "out")]

        def call() -> object:
            parsed = cli._parser().parse_args(line)
            return parsed.run(parsed)

        return Trial(call)

    add(BadCase(f"train: {label}", build, ("UserError", "SystemExit"), words, needs_extension=False))


def _image(path: Path, content: bytes | None = None) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (40, 40), (200, 10, 10)).save(path)
    else:
        path.write_bytes(content)


def _folder(root: Path, broken: str, content: bytes) -> list[str]:
    for name in ("cats", "dogs"):
        for i in range(6):
            _image(root / "data" / name / f"{i}.png")
    _image(root / "data" / "cats" / broken, content)
    return ["train", "--model", "cifar.resnet20", "--data", str(root / "data"), "--size", "32", "--batch-size", "4"]


def _empty(root: Path) -> list[str]:
    (root / "data").mkdir()
    return ["train", "--model", "cifar.resnet20", "--data", str(root / "data")]


def _empty_classes(root: Path) -> list[str]:
    for name in ("cats", "dogs"):
        (root / "data" / name).mkdir(parents=True)
    return ["train", "--model", "cifar.resnet20", "--data", str(root / "data")]


def _cut(root: Path) -> list[str]:
    _image(root / "whole.png")
    return _folder(root, "cut.png", (root / "whole.png").read_bytes()[:60])


def _corrupt_resume(root: Path) -> list[str]:
    (root / "out").mkdir()
    for name in ("last.pt", "best.pt", "checkpoint.pt"):
        (root / "out" / name).write_bytes(b"PK\x03\x04 not a checkpoint")
    return ["train", "--resume", "--model", "cifar.resnet20", "--data", "digits"]


_command(
    "a folder that is not there",
    ("nowhere",),
    lambda d: ["train", "--model", "cifar.resnet20", "--data", str(d / "nowhere")],
)
_command("an empty folder", ("data",), _empty)
_command("classes without images", ("data",), _empty_classes)
_command(
    "a text file among the images", ("notes.txt", "--skip-broken"), lambda d: _folder(d, "notes.txt", b"not an image")
)
_command("an image cut short", ("cut.png", "--skip-broken"), _cut)
_command("resuming from a damaged checkpoint", ("corrupt",), _corrupt_resume)
