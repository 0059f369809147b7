"""Convolutions without batch norms that ATen is measured to do faster: the plan takes it, with the same results."""

from collections.abc import Callable

import pytest
import torch

from fused_resnet import testing
from tests.ops.conv_problems import op

pytestmark = pytest.mark.usefixtures("needs_extension")

# dtype, channels, filters, height and width, kernel, stride; whether forward, and the data gradient, are ATen's.
PLANS = (
    (torch.float32, 1024, 8, 46, 1, 1, True, True),
    (torch.float32, 8, 1024, 46, 1, 1, True, True),
    (torch.float32, 1024, 8, 7, 1, 1, False, False),
    (torch.float32, 64, 64, 46, 1, 1, False, False),
    (torch.float32, 256, 8, 7, 3, 2, True, False),
    (torch.bfloat16, 64, 64, 46, 1, 1, True, True),
    (torch.bfloat16, 256, 64, 46, 1, 1, False, True),
    (torch.bfloat16, 128, 8, 7, 3, 2, True, False),
    (torch.bfloat16, 512, 512, 5, 3, 1, True, True),
)


def _convolutions_of_aten(call: Callable[[], object]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return any(event.name.startswith("aten::") and "conv" in event.name for event in profiler.events())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_plan_and_its_results(isa: str, plan: tuple[torch.dtype, int, int, int, int, int, bool, bool]) -> None:
    dtype, c, k, size, kernel, stride, *by_aten = plan
    measured = isa == "avx512_bf16" or (isa in ("avx512", "amx") and dtype == torch.float32)
    torch.manual_seed(0)
    x = torch.randn(1, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5).to(dtype)
    bias = torch.randn(k).to(dtype)
    geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], 1
    y = op("conv2d_forward")(x, weight, bias, *geometry)
    dy = torch.randn_like(y)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.conv2d(*exact, stride, kernel // 2)
    expected.backward(dy.double())
    dx, dweight, dbias = op("conv2d_backward")(dy, x, weight, True, *geometry, [True] * 3)
    testing.assert_close(y, expected.detach(), reduction_length=c * kernel**2, name="y")
    for name, got, of, length in (
        ("dx", dx, exact[0], k * kernel**2),
        ("dweight", dweight, exact[1], y[:, 0].numel()),
        ("dbias", dbias, exact[2], y[:, 0].numel()),
    ):
        testing.assert_close(got, of.grad, reduction_length=length, name=name)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)

    forward = _convolutions_of_aten(lambda: op("conv2d_forward")(x, weight, bias, *geometry))
    data = _convolutions_of_aten(lambda: op("conv2d_backward")(dy, x, weight, True, *geometry, [True, False, False]))
    assert [forward, data] == [measured and taken for taken in by_aten]
