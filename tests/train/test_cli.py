"""The command line's entry points."""

import json
import subprocess
import sys

import pytest

import fused_resnet as fr
from fused_resnet import cli
from tests.oracles import torchvision

assert torchvision  # declares its operators, so that `convert` can import it


@pytest.mark.parametrize(
    "command", [[], ["info"], ["train"], ["predict"], ["export"], ["serve-bench"], ["convert"], ["bench"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fused-resnet")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fused-resnet {fr.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--fast"], ["convert"]])
def test_misuse_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"version           {fr.__version__}\n" in text
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info == fr.build_info()
    assert info["cuda_usable"] is (info["why_no_cuda"] is None)


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fused_resnet", "--version"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"fused-resnet {fr.__version__}\n")


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "torchvision:resnet18", "--size", "64"]) == 0
    assert "compute the same" in capsys.readouterr().out
    assert cli.main(["convert", "torchvision:resnet18", "--size", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"]
    assert report["state_dict_keys_kept"]
    assert report["relative_difference"] < 1e-4
    assert len(report["units"]) >= 8
    if fr.is_available():
        assert report["fused"] >= 8


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["resnet50"], 2, "torchvision:NAME or timm:NAME"),
        (["torchvision:resnet51"], 2, "torchvision cannot build it"),
        (["torchvision:resnet18", "--weights", "/nowhere.pt"], 1, "/nowhere.pt"),
        (["torchvision:resnet18", "--size", "0"], 2, "greater than 0"),
    ],
)
def test_convert_errors(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        got = cli.main(["convert", *arguments])
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert got == code
    assert words in err
    assert err.count("\n") == 1
