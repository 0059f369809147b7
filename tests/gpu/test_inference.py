"""Inference on the GPU: cuDNN's fused convolutions in CUDA graphs give what eager gives, for every shape and caller."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.inference.cuda import CudaRunner

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _model(name: str = "resnet18") -> nn.Module:
    return testing.with_statistics(getattr(fr.models, name)(num_classes=10))


def _exact(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), fr.nn.stock():
        result: Tensor = model.double()(x.double())
    model.float()
    return result


def _assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error <= TOLERANCE[dtype], error


# Every dtype once; bottlenecks and groups in the dtype that shows most and the one that is used most.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("resnet18", dtype) for dtype in TOLERANCE]
    + [(name, dtype) for name in ("resnet50", "resnext50_32x4d") for dtype in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_logits_are_eagers(name: str, dtype: torch.dtype) -> None:
    model = _model(name)
    folded = fr.optimize_for_inference(model.double() if dtype is torch.float64 else model, dtype=dtype)
    for shape in ((4, 3, 64, 64), (1, 3, 96, 80), (4, 3, 64, 64), (3, 3, 33, 47)):
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        x = x.double() if dtype is torch.float64 else x
        exact = _exact(model, x)
        for images in (x, x.contiguous()):
            y = folded(images)
            assert y.dtype == x.dtype
            _assert_close(y, exact, dtype)


def test_a_result_is_the_callers_own() -> None:
    model = _model()
    folded = fr.optimize_for_inference(model)
    first, second = torch.randn(2, 2, 3, 64, 64)
    y = folded(first)
    kept = y.clone()
    folded(second)
    assert torch.equal(y, kept)


def test_nan_goes_through_as_in_eager() -> None:
    model = _model()
    folded = fr.optimize_for_inference(model)
    x = torch.randn(2, 3, 64, 64)
    x[1, 0, 5, 5] = float("nan")
    y = folded(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all() == _exact(model, x)[1].isnan().all()


def test_an_empty_batch() -> None:
    assert fr.optimize_for_inference(_model())(torch.randn(0, 3, 64, 64)).shape == (0, 10)


def test_more_shapes_than_are_kept(cuda: torch.device) -> None:
    model = _model()
    folded = fr.optimize_for_inference(model)
    for _ in range(2):
        for batch in range(1, 7):
            x = torch.randn(batch, 3, 32, 32)
            _assert_close(folded(x), _exact(model, x), torch.float32)
    assert isinstance(folded._others(), CudaRunner)


def test_streams_and_threads_take_turns(cuda: torch.device) -> None:
    model = _model()
    folded = fr.optimize_for_inference(model)
    images = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    exact = [_exact(model, x) for x in images]
    torch.cuda.synchronize()
    results: dict[int, list[Tensor]] = {index: [] for index in range(4)}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[index].append(folded(images[index]))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert len(results[index]) == 5
        for y in results[index]:
            _assert_close(y, exact[index], torch.float32)


def test_a_file_runs_on_the_gpu(cuda: torch.device, tmp_path: Path) -> None:
    model = _model()
    fr.save_inference(fr.optimize_for_inference(model, dtype=torch.bfloat16), tmp_path / "model.frn")
    folded = fr.load_inference(tmp_path / "model.frn", device=cuda)
    x = torch.randn(2, 3, 64, 64)
    _assert_close(folded(x), _exact(model, x), torch.bfloat16)
