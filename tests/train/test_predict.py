"""Classifying image files with a checkpoint."""

import json
from pathlib import Path

import pytest

from fused_resnet import cli
from fused_resnet.train import checkpoint
from fused_resnet.train.options import TrainOptions
from fused_resnet.train.run import train
from tests.train import files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that tells red photographs from blue ones."""
    root = tmp_path_factory.mktemp("photos")
    photos = files.write_photos(root / "photos", files.RED_AND_BLUE, count=20)
    common = {"model": "cifar.resnet20", "size": 16, "batch_size": 9, "lr": 0.02, "epochs": 5, "seed": 1, "quiet": True}
    assert train(TrainOptions(data=str(photos), out=str(root / "run"), **common)).test_accuracy == 1.0
    return root / "run"


def _photos(folder: Path) -> list[str]:
    colours = {"a.png": (230, 10, 10), "b.jpg": (10, 10, 230), "c.png": (200, 40, 40)}
    return [str(files.write_photo(folder / name, colour=colour)) for name, colour in colours.items()]


def test_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--checkpoint", str(run), "--top", "1", *_photos(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in lines] == ["a.png", "b.jpg", "c.png"]
    assert [line.split()[1] for line in lines] == ["red", "blue", "red"]
    assert all(line.endswith("%") for line in lines)


def test_json_and_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _photos(tmp_path / "in")
    assert cli.main(["predict", "--checkpoint", str(run / "last.pt"), "--json", str(tmp_path / "in")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["top"][0]["class"] for row in rows] == ["red", "blue", "red"]
    for row in rows:
        probabilities = [entry["probability"] for entry in row["top"]]
        assert len(probabilities) == 2
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_a_broken_file_does_not_stop_the_others(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _photos(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"x")
    assert cli.main(["predict", "--checkpoint", str(run), good[0], str(tmp_path / "broken.png"), good[1]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "red" in lines[0]
    assert "broken.png: a broken or non-image file" in lines[1]
    assert "--skip-broken" not in lines[1]
    assert "blue" in lines[2]


def test_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = _photos(tmp_path)[0]
    state = checkpoint.load(run / "best.pt")
    checkpoint.save({**state, "classes": ["a", "b", "c"]}, tmp_path / "misfit.pt")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--checkpoint", str(tmp_path / "none.pt"), photo], 1, "no such checkpoint"),
        (["--checkpoint", photo, photo], 1, "not a checkpoint"),
        (["--checkpoint", str(tmp_path / "misfit.pt"), photo], 1, "does not fit"),
        (["--checkpoint", str(tmp_path / "empty"), photo], 1, "no such checkpoint"),
        (["--checkpoint", str(run), str(tmp_path / "nowhere.png")], 2, "no such file"),
        (["--checkpoint", str(run), "a" * 300], 2, "no such file"),
        (["--checkpoint", "a" * 300, photo], 1, "File name too long"),
        (["--checkpoint", str(run), str(tmp_path / "empty")], 2, "the folder is empty"),
        (["--checkpoint", str(run), "--top", "0", photo], 2, "greater than 0"),
        (["--checkpoint", str(run), "--device", "gpu", photo], 2, "--device gpu: must be auto"),
        (["--checkpoint", str(run), "--device", "cuda:999", photo], 2, "--device cuda:999: this PyTorch sees"),
        ([photo], 2, "--checkpoint"),
    ]
    for arguments, expected, words in cases:
        try:
            code = cli.main(["predict", *arguments])
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (expected, 1), err
        assert words in err
