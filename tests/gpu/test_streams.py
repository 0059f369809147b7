"""Work goes to the caller's stream and device, and memory is not reused too early."""

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.ops.cases import LAYOUTS, OPS, Case, make, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

LONG = 20_000_000  # clock cycles, about ten milliseconds: what does not wait for them reads old numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_run_on_the_current_stream(op: str, layout: str, cuda: torch.device) -> None:
    """The operands arrive late on a side stream: a kernel on any other stream would read what was there before."""
    operands = make(Case(op, (4, 24, 14, 10), torch.float32, layout))
    expected = run(operands)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()

    def late(name: str, tensor: Tensor) -> Tensor:
        stale = torch.full_like(tensor, float("nan"))
        torch.cuda._sleep(LONG)
        return stale.copy_(tensor)

    with torch.cuda.stream(stream):
        got = run(operands, arrange=late)
    stream.synchronize()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_two_streams_at_once(cuda: torch.device) -> None:
    cases = [Case(op, (16, 64, 28, 28), torch.bfloat16, "NHWC", "relu") for op in ("residual", "dual", "max_pool")]
    operands = [make(case) for case in cases]
    expected = [run(o) for o in operands]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in operands]
    for _ in range(5):
        results = []
        for stream, o in zip(streams, operands, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(o))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_workspace_is_not_reused_while_kernels_still_read_it(cuda: torch.device) -> None:
    """Temporary blocks go back to the allocator when a call returns; the same stream may then fill them at once."""
    operands = make(Case("plain", (32, 64, 56, 56), torch.float32, "NHWC", "silu"))
    expected = run(operands)
    for _ in range(5):
        torch.cuda._sleep(LONG)
        got = run(operands)
        for size in (256, 4096, 65536, 1 << 20):
            torch.full((size,), float("nan"))
        assert all(torch.equal(got[key], value) for key, value in expected.items())


@pytest.mark.parametrize("op", OPS)
def test_a_second_gpu_gives_the_same_and_the_current_one_stays(op: str, cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    operands = make(Case(op, (4, 24, 14, 10), torch.float32, "NHWC", "relu"))
    expected = run(operands)
    with torch.device("cuda", 1):
        got = run(operands.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for key, value in expected.items():
        assert got[key].device.index == 1, key
        torch.testing.assert_close(got[key].to(cuda), value, rtol=1e-5, atol=1e-5)


def test_inference_in_a_thread_of_its_own(on_device: torch.device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = fr.models.resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: torch.inference_mode()(model)(x), range(4)))
    for got in found:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
