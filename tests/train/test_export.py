"""From a checkpoint or weights to one file, and predictions from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet import cli
from fused_resnet.train import checkpoint, networks
from tests.train import files

PREPROCESS = {"size": 24, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "resize_ratio": 1.0, "grayscale": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose batch norms have statistics of their own."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    model = networks.build("cifar.resnet20", 3)
    model(torch.randn(4, 3, 24, 24))
    state: dict[str, Any] = {"network": "cifar.resnet20", "classes": ["a", "b", "c"], "preprocess": PREPROCESS}
    checkpoint.save({**state, "options": {}, "model": model.state_dict()}, folder / "best.pt")
    return folder


def probabilities(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, float]]:
    capsys.readouterr()
    assert cli.main(["predict", "--json", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    return [{entry["class"]: entry["probability"] for entry in row["top"]} for row in rows]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predictions_of_the_exported_file(
    trained: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.frn"
    assert cli.main(["export", "--checkpoint", str(trained), "--out", str(out), "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: cifar.resnet20, ")
    assert dtype in said
    module = fr.load_inference(out)
    assert module.metadata == {"network": "cifar.resnet20", "classes": ["a", "b", "c"], "preprocess": PREPROCESS}
    assert str(module.dtype) == f"torch.{dtype}"
    photos = [str(files.write_photo(tmp_path / f"{i}.png", colour=(80 * i, 9, 200 - 60 * i))) for i in range(3)]
    expected = probabilities(capsys, "--checkpoint", str(trained), *photos)
    got = probabilities(capsys, "--checkpoint", str(out), *photos)
    for row, wanted in zip(got, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5 if dtype == "float32" else 2e-2)
    with fr.nn.stock():
        model = networks.build("cifar.resnet20", 3).eval()
        model.load_state_dict(checkpoint.load(trained / "best.pt")["model"])
        x = torch.randn(2, 3, 24, 24)
        torch.testing.assert_close(module(x), model(x), rtol=0, atol=1e-4 if dtype == "float32" else 5e-2)


def test_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fr.models.resnet18(num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "net.frn"
    source = ["--model", "resnet18", "--weights", str(tmp_path / "weights.pt"), "--classes", "7"]
    assert cli.main(["export", *source, "--out", str(out)]) == 0
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fr.load_inference(out)(x), model(x), rtol=1e-4, atol=1e-4)
    photo = str(files.write_photo(tmp_path / "a.png"))
    capsys.readouterr()
    assert cli.main(["predict", "--checkpoint", str(out), photo]) == 1
    assert "does not say its classes" in capsys.readouterr().err


def test_a_damaged_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.frn"
    assert cli.main(["export", "--checkpoint", str(trained / "best.pt"), "--out", str(out)]) == 0
    whole = out.read_bytes()
    photo = str(files.write_photo(tmp_path / "a.png"))
    for content in (whole[:-1], whole[:100], whole[:9000] + b"x" + whole[9001:]):
        out.write_bytes(content)
        capsys.readouterr()
        assert cli.main(["predict", "--checkpoint", str(out), photo]) == 1
        err = capsys.readouterr().err
        assert str(out) in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": "abc"},
        {"classes": ["a", "b"]},
        {"preprocess": 3},
        {"preprocess": {**PREPROCESS, "size": 0}},
        {"preprocess": {**PREPROCESS, "size": "24"}},
        {"preprocess": {**PREPROCESS, "mean": [1]}},
        {"preprocess": {**PREPROCESS, "std": ["a", "b", "c"]}},
    ],
)
def test_a_file_that_says_nonsense(
    trained: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.frn"
    assert cli.main(["export", "--checkpoint", str(trained), "--out", str(out)]) == 0
    module = fr.load_inference(out)
    fr.save_inference(module, out, metadata={**module.metadata, **change})
    capsys.readouterr()
    assert cli.main(["predict", "--checkpoint", str(out), str(files.write_photo(tmp_path / "a.png"))]) == 1
    err = capsys.readouterr().err
    assert str(out) in err
    assert err.count("\n") == 1


def test_errors(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pt").write_bytes(b"x")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pt")
    out = ["--out", str(tmp_path / "net.frn")]
    cases = [
        (["--checkpoint", str(tmp_path / "none.pt"), *out], 1, "no such checkpoint"),
        (["--checkpoint", str(tmp_path / "bad.pt"), *out], 1, "not a checkpoint"),
        (["--checkpoint", str(trained), "--out", str(tmp_path / "no" / "net.frn")], 2, "--out"),
        (["--checkpoint", str(trained), "--out", str(tmp_path)], 2, "--out"),
        (["--checkpoint", str(trained), "--weights", "x.pt", *out], 2, "--weights: belongs to --model"),
        (["--checkpoint", str(trained), "--model", "resnet18", *out], 2, "--model"),
        (["--model", "resnet18", *out], 2, "--weights: needed"),
        (["--model", "resnet19", "--weights", "x.pt", *out], 2, "--model resnet19: unknown"),
        (["--model", "resnet18", "--weights", str(tmp_path / "none.pt"), *out], 1, "none.pt"),
        (["--model", "resnet18", "--weights", str(tmp_path / "bad.pt"), *out], 1, "bad.pt"),
        (["--model", "resnet18", "--weights", str(tmp_path / "other.pt"), *out], 1, "missing"),
        (["--model", "resnet18", "--weights", "x.pt", "--classes", "0", *out], 2, "--classes 0"),
        (["--checkpoint", str(trained), "--dtype", "int8", *out], 2, "--dtype"),
        (["--checkpoint", str(trained)], 2, "--out"),
        (out, 2, "--checkpoint"),
    ]
    for arguments, expected, words in cases:
        try:
            code = cli.main(["export", *arguments])
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        assert (code, err.count("\n")) == (expected, 1), err
        assert words in err
    assert not (tmp_path / "net.frn").exists()
