"""Checkpoints are whole or not there, and a damaged one is never taken for a good one."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import models
from fused_resnet.train import checkpoint
from fused_resnet.train.errors import CheckpointError

STATE: dict[str, Any] = {
    "options": {"model": "m", "lr": 0.1},
    "network": "m",
    "classes": ["a", "b"],
    "preprocess": {"size": 8},
    "model": {"weight": torch.arange(1000.0)},
}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "last.pt"
    checkpoint.save(STATE, path)
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert {k: v for k, v in state.items() if k not in ("model", "format")} == {
        k: v for k, v in STATE.items() if k != "model"
    }
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_the_old_one_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CheckpointError, match="No space left"):
                checkpoint.save({**STATE, "network": "other"}, path)
        assert path.read_bytes() == before


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    checkpoint.save(STATE, tmp_path / "last.pt")
    assert calls == ["fsync", "replace", "fsync"]


def test_one_state_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    checkpoint.save(STATE, best, last)
    checkpoint.save({**STATE, "network": "newer"}, last)
    assert [checkpoint.load(path)["network"] for path in (best, last)] == ["m", "newer"]

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.save({**STATE, "network": "newest"}, best, last)
    assert [checkpoint.load(path)["network"] for path in (best, last)] == ["newest", "newest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_killed_between_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    checkpoint.save({**STATE, "network": "old"}, best, last)
    real = os.replace

    class KilledError(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        if target == last:
            raise KilledError
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            checkpoint.save(STATE, best, last)
    assert [checkpoint.load(path)["network"] for path in (best, last)] == ["m", "old"]
    checkpoint.save({**STATE, "network": "newer"}, last)
    assert [checkpoint.load(path)["network"] for path in (best, last)] == ["m", "newer"]


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    whole = path.read_bytes()
    rng, messages = random.Random(0), []
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            state = checkpoint.load(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            # Only bits that carry nothing (padding, dates) may go unnoticed.
            assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
            assert state["options"] == STATE["options"]
    assert len(messages) > 100
    assert all(str(path) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_cut_short(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(STATE, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="corrupt"):
        checkpoint.load(path)


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code in a checkpoint ran')",))


def test_not_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="folder"):
        checkpoint.load(tmp_path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(_RunsCode()))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    torch.save(_RunsCode(), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="options, network, classes"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a checkpoint of"):
        checkpoint.load(path)
    torch.save({**STATE, "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(path)


def test_a_model_takes_its_weights_from_a_checkpoint(tmp_path: Path) -> None:
    trained = models.cifar.resnet20()
    checkpoint.save({**STATE, "model": trained.state_dict()}, tmp_path / "last.pt")
    fresh = models.cifar.resnet20(weights=tmp_path / "last.pt")
    assert torch.equal(fresh.fc.weight, trained.fc.weight)
