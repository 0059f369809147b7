"""Serving under several callers: every call is counted, errors come through, and nothing judges a time."""

import json
import threading
from pathlib import Path

import pytest
import torch

from fused_resnet import cli
from fused_resnet.train import serve_bench
from tests.train.test_export import trained as trained  # the fixture

SMALL = ["--seconds", "0.01", "--model", "cifar.resnet20", "--classes", "10"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert cli.main(["serve-bench", *SMALL, "--callers", "1,3", "--batch", "2", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cifar.resnet20, batch 2, 32x32, bfloat16"
    assert [line.split()[:3] for line in lines[4:]] == [
        ["1", "1", "ours"], ["1", "1", "eager"], ["3", "1", "ours"], ["3", "1", "eager"],
    ]  # fmt: skip
    assert torch.get_num_threads() == before


def test_json_and_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.frn"
    assert cli.main(["export", "--checkpoint", str(trained), "--out", str(out)]) == 0
    for source, sides in ((trained, ["ours", "eager"]), (out, ["ours"])):
        capsys.readouterr()
        arguments = ["--checkpoint", str(source), "--callers", "2", "--seconds", "0.01", "--threads", "4", "--json"]
        assert cli.main(["serve-bench", *arguments]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["size"] == [24, 24]
        assert [row["side"] for row in result["rows"]] == sides
        for row in result["rows"]:
            assert (row["callers"], row["threads"]) == (2, 2)
            assert row["calls"] >= 2
            assert 0 < row["p50_ms"] <= row["p99_ms"]
            assert row["images_per_s"] > 0


def test_callers_call_at_once_and_all_are_counted() -> None:
    together = threading.Barrier(3, timeout=60)
    lock, made = threading.Lock(), []

    def call() -> None:
        with lock:
            made.append(threading.get_ident())
        if len(made) <= 3:  # the first of each: alone, it would wait for ever
            together.wait()

    took, elapsed = serve_bench._turn(call, 3, 1, 0.01)
    assert len(took) == len(made) - 3  # all but the first of each
    assert len(set(made)) == 3
    assert elapsed > 0


def test_an_error_of_a_caller_comes_through() -> None:
    first = threading.Lock()

    def call() -> None:
        if not first.acquire(blocking=False):
            raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        serve_bench._turn(call, 3, 1, 0.01)


def test_quantiles() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (serve_bench._quantile(values, 0.5), serve_bench._quantile(values, 0.99)) == (51, 100)
    assert serve_bench._quantile([7.0], 0.99) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([*SMALL, "--callers", "1,x"], 2, "--callers 1,x"),
        ([*SMALL, "--callers", "0"], 2, "--callers 0"),
        ([*SMALL, "--batch", "0"], 2, "--batch 0"),
        ([*SMALL, "--batch", "1000000000000"], 2, "--batch 1000000000000"),
        (["--checkpoint", "a" * 300], 1, "File name too long"),
        ([*SMALL, "--threads", "-1"], 2, "--threads -1"),
        ([*SMALL, "--seconds", "nan"], 2, "--seconds nan"),
        (["--model", "resnet51"], 2, "--model resnet51: unknown"),
        (["--checkpoint", "/nowhere.frn"], 1, "no such checkpoint"),
        (["--seconds", "1"], 2, "--checkpoint"),
    ],
)
def test_errors(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        got = cli.main(["serve-bench", *arguments])
    except SystemExit as stop:
        got = stop.code
    err = capsys.readouterr().err
    assert (got, err.count("\n")) == (code, 1), err
    assert words in err
