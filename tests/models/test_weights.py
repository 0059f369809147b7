"""Weights load whole or not at all, and the error lists everything that is wrong."""

from __future__ import annotations

import copy
import hashlib
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.models.weights import load_weights


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(model().state_dict(), path)
    return path


def refused(target: nn.Module, weights: Any, error: type[Exception] = RuntimeError) -> str:
    """The message; the model is as before."""
    before = copy.deepcopy(target)
    with pytest.raises(error) as info:
        load_weights(target, weights)
    assert same(target, before)
    return str(info.value)


def test_none_leaves_the_model() -> None:
    target = model()
    before = copy.deepcopy(target)
    load_weights(target, None)
    assert same(target, before)


@pytest.mark.parametrize("as_path", [str, Path])
def test_path(file: Path, as_path: Callable[[Path], Any]) -> None:
    target = model()
    load_weights(target, as_path(file), progress=False)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    assert all(torch.equal(value, loaded[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_state_dict_and_checkpoint(wrap: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    source, target = model(), model()
    load_weights(target, wrap(source.state_dict()))
    assert same(target, source)


def test_constructor_takes_weights(tmp_path: Path) -> None:
    source = fr.models.resnet18(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    assert same(fr.models.resnet18(num_classes=3, weights=tmp_path / "resnet18.pth"), source)


def test_other_dtypes_are_converted() -> None:
    target, source = model(), model().double()
    load_weights(target, source.state_dict())
    assert same(target, source.float())


def test_files_without_step_counters() -> None:
    source, target = model(), model()
    load_weights(target, {k: v for k, v in source.state_dict().items() if "num_batches_tracked" not in k})
    assert same(target, source)


def test_error_lists_everything_and_nothing_is_copied() -> None:
    state: dict[str, Any] = dict(model().state_dict())
    del state["0.bias"], state["3.weight"]
    state |= {"0.weight": torch.zeros(3, 2, 3, 3), "1.weight": [1, 2, 3], "extra": torch.zeros(1), "more": 1}
    message = refused(model(), state)
    assert "missing: 0.bias, 3.weight" in message
    assert "unexpected: extra, more" in message
    assert "0.weight (expected (3, 2, 1, 1), got (3, 2, 3, 3))" in message
    assert "1.weight (expected a tensor, got list)" in message
    assert "unchanged" in message


def test_other_model(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    message = refused(model(), path)
    assert str(path) in message
    assert "unexpected: weight, bias" in message


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = b"\xff" * 200
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        overwritten,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_text("<html>404</html>"),
    ],
)
def test_damaged_file(file: Path, damage: Callable[[Path], Any]) -> None:
    damage(file)
    message = refused(model(), file)
    assert "not a readable weights file" in message
    assert str(file) in message


class Payload:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/nonexistent/touched"),))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save(Payload(), tmp_path / "evil.pth")
    assert "not a readable weights file" in refused(model(), tmp_path / "evil.pth")


def test_file_with_something_else(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    assert "holds a Tensor, expected a state_dict" in refused(model(), tmp_path / "tensor.pth")


def test_directory_and_missing_file(tmp_path: Path) -> None:
    assert "not a readable weights file" in refused(model(), tmp_path)
    assert "no file" in refused(model(), tmp_path / "none.pth", FileNotFoundError)
    assert "weights enum" in refused(model(), "IMAGENET1K_V1", FileNotFoundError)


@pytest.mark.parametrize("weights", [3, True, object(), ["a"]])
def test_other_types(weights: Any) -> None:
    assert type(weights).__name__ in refused(model(), weights, TypeError)


class Entry:
    """What a torchvision weights entry offers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get_state_dict(self, *_: Any, **__: Any) -> Mapping[str, Any]:
        raise AssertionError("its own way of loading would run pickled code")


def test_entry_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source, target = model(), model()
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / "net-12345678.pth")
    load_weights(target, Entry("https://example.invalid/models/net-12345678.pth"), progress=False)
    assert same(target, source)


def test_entry_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source, target = model(), model()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
    for name, fits in ((f"net-{digest}.pth", True), ("net-00000000.pth", False)):
        (tmp_path / name).write_bytes((tmp_path / "net.pth").read_bytes())
        entry = Entry((tmp_path / name).as_uri())
        if fits:
            load_weights(target, entry, progress=False)
            assert same(target, source)
        else:
            assert "invalid hash" in refused(target, entry)


def test_unreachable_entry_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = refused(model(), Entry("https://example.invalid/models/net-12345678.pth"))
    assert "no route to host" in message
    assert "weights='/path/to/net-12345678.pth'" in message
    assert str(tmp_path / "checkpoints" / "net-12345678.pth") in message
