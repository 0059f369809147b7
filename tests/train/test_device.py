"""Which device a command computes on, where there is a GPU and where there is none."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_resnet import _extension, cli
from fused_resnet.train import run
from fused_resnet.train.errors import OptionError
from fused_resnet.train.options import TrainOptions

WHY = "fused_resnet has no kernels for cuda:0 because it is too old."


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "available", lambda: True)


def test_without_a_gpu(no_gpu: None) -> None:
    assert _extension.pick_device() == _extension.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(ValueError, match=f"{name}: this PyTorch sees no GPU"):
            _extension.pick_device(name)


def test_with_usable_gpus(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_no_cuda", lambda _=0: None)
    names = {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu"}
    assert {name: str(_extension.pick_device(name)) for name in names} == names
    with pytest.raises(ValueError, match="cuda:2: this PyTorch sees 2 GPU"):
        _extension.pick_device("cuda:2")


def test_a_gpu_without_kernels_is_used_when_asked_for(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "why_no_cuda", lambda _=0: WHY)
    with pytest.warns(UserWarning, match="too old"):
        assert str(_extension.pick_device()) == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(_extension.pick_device("cuda")) == "cuda:0"
        assert str(_extension.pick_device(stock=True)) == "cuda:0"
        monkeypatch.setattr(_extension, "available", lambda: False)
        assert str(_extension.pick_device()) == "cuda:0"


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:0 ", "meta"])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(ValueError, match="must be auto, cpu, cuda or cuda:N"):
        _extension.pick_device(name)


def test_half_precision_needs_the_gpu(no_gpu: None) -> None:
    with pytest.raises(OptionError, match="--fp16: on a GPU only"):
        run.pick_device(TrainOptions(model="m", data="d", fp16=True))
    with pytest.raises(OptionError, match="--device cuda:1: this PyTorch sees no GPU"):
        run.pick_device(TrainOptions(model="m", data="d", device="cuda:1"))


@pytest.mark.parametrize(
    ("module", "index", "why"),
    [
        (SimpleNamespace(build_config=lambda: {"cuda": True}, why_no_cuda=lambda _: None), 1, None),
        (SimpleNamespace(build_config=lambda: {"cuda": True}, why_no_cuda=lambda _: "no image."), 0, "no image."),
        (SimpleNamespace(build_config=lambda: {"cuda": True}, why_no_cuda=lambda _: None), 2, "sees no cuda:2."),
        (SimpleNamespace(build_config=lambda: {"cuda": False}), 0, "built without CUDA"),
    ],
    ids=["usable", "no image", "no such GPU", "CPU build"],
)
def test_why_a_gpu_has_no_kernels(
    module: SimpleNamespace, index: int, why: str | None, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_extension, "_load", lambda: (module, None))
    reason = _ask(index)
    assert reason is None if why is None else reason is not None and why in reason and reason.endswith(".")


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch, needs_extension: None) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} has no CUDA" in str(_ask(0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in str(_ask(0))


def _ask(index: int) -> str | None:
    """Without the answers of earlier tests, and leaving none."""
    _extension._why_no_cuda.cache_clear()
    try:
        return _extension.why_no_cuda(index)
    finally:
        _extension._why_no_cuda.cache_clear()


def test_an_error_that_may_pass_is_asked_about_again(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str | Exception | None] = [RuntimeError("it is full.\nC++ frames"), None, "no image."]

    def ask(_: int) -> str | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = SimpleNamespace(build_config=lambda: {"cuda": True}, why_no_cuda=ask)
    monkeypatch.setattr(_extension, "_load", lambda: (module, None))
    _extension._why_no_cuda.cache_clear()
    try:
        assert [_extension.why_no_cuda(index) for index in (0, 0, 0, 1, 1)] == [
            "it is full.",
            None,
            None,
            "no image.",
            "no image.",
        ]
    finally:
        _extension._why_no_cuda.cache_clear()


def test_the_benchmark_says_what_it_cannot_compare(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(_extension, "why_no_cuda", lambda _=0: WHY)
    assert cli.main(["bench", "--device", "cuda:1"]) == 1
    assert capsys.readouterr().err == f"fused-resnet bench: nothing to compare: {WHY}\n"
    assert cli.main(["bench", "--device", "cuda:2"]) == 2
    assert capsys.readouterr().err.startswith("fused-resnet bench: --device cuda:2: ")


def test_a_cpu_benchmark(capsys: pytest.CaptureFixture[str], needs_extension: None) -> None:
    line = "bench --device cpu --model cifar.resnet20 --batch 2 --size 16 --rounds 1 --dtype fp32"
    assert cli.main(line.split()) == 0
    assert "kernels " + _extension.build_info()["cpu_isa"] in capsys.readouterr().out
