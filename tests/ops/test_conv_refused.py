"""Problems and operands that the convolution kernels must not take: geometry far apart, statistics that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import ops
from tests.nn.twins import randomise

pytestmark = pytest.mark.usefixtures("needs_extension")


def nhwc(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


GEOMETRIES = {
    "sizes beyond 64 bits": ((1, 16, 4, 4), 2, {"padding": 2**28 - 2, "dilation": 2**29 - 4}),
    "dilation beyond the image": ((1, 8, 6, 6), 3, {"padding": 20000, "dilation": 20000}),
    "stride beyond the image": ((2, 8, 9, 7), 3, {"padding": 1, "stride": 1000}),
    "atrous pooling": ((1, 16, 33, 33), 3, {"padding": 12, "dilation": 12}),
    "dilated residual network": ((2, 16, 15, 14), 3, {"padding": 4, "dilation": 4}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry_far_apart_gives_what_aten_gives(name: str) -> None:
    shape, kernel, geometry = GEOMETRIES[name]
    x = nhwc(*shape).requires_grad_()
    weight = nhwc(shape[1], shape[1], kernel, kernel).requires_grad_()
    y = ops.conv2d(x, weight, **geometry)
    torch.testing.assert_close(y, F.conv2d(x, weight, **geometry))
    got = torch.autograd.grad(y.sum(), (x, weight))
    want = torch.autograd.grad(F.conv2d(x, weight, **geometry).sum(), (x, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 1, 1), (4, 1, 3), (3, 3, 3), (3, 5, 5), (2, 6, 6), (2, 7, 7), (3, 4, 8), (6, 2, 2)]
)
def test_groups_of_other_sizes_give_what_aten_gives(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    groups, ins, outs = shape
    x = nhwc(2, groups * ins, 9, 7).to(dtype).requires_grad_()
    weight = nhwc(groups * outs, ins, 3, 3).to(dtype).requires_grad_()
    for stride in (1, 2):
        y = ops.conv2d(x, weight, stride=stride, padding=1, groups=groups)
        want = F.conv2d(x, weight, stride=stride, padding=1, groups=groups)
        torch.testing.assert_close(y, want)
        got = torch.autograd.grad(y.sum(), (x, weight))
        torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (x, weight)))


def block() -> nn.Module:
    return randomise(fr.nn.Bottleneck(32, 8)).double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["bn1", "bn3"])
def test_statistics_of_another_size_are_refused_and_nothing_changes(norm: str, training: bool) -> None:
    model = block().train(training)
    getattr(model, norm).running_mean = torch.zeros(5, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(RuntimeError, match=r"expected running_mean of shape \(\d+,\), got \[5\]"):
        model(nhwc(2, 32, 6, 5))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_half_of_the_statistics_is_refused() -> None:
    model = block().eval()
    model.bn3.running_mean = None
    with pytest.raises(RuntimeError, match="expected running_mean and running_var when not training, got None"):
        model(nhwc(2, 32, 6, 5))


def test_raw_operator_wants_statistics_and_a_known_activation() -> None:
    x, weight = nhwc(2, 8, 5, 5), nhwc(8, 8, 1, 1)
    one = torch.ones(8, dtype=torch.float64)
    operator = torch.ops.fused_resnet.conv2d_norm_forward
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match="expected running_mean and running_var when not training"):
        operator(x, None, None, None, None, 1, 0.01, weight, *geometry, None, None, False, 1e-5)
    with pytest.raises(ValueError, match="expected eps > 0"):
        operator(x, None, None, None, None, 1, 0.01, weight, *geometry, None, None, True, 0.0)
    for act in (3, 99):
        with pytest.raises(ValueError, match="expected act from 0 to 6 and not prelu"):
            operator(x, one, one, None, None, act, 0.01, weight, *geometry, None, None, True, 1e-5)


def test_a_block_used_twice_where_one_use_is_stock_can_be_differentiated() -> None:
    model = randomise(fr.nn.BasicBlock(8, 8)).to(memory_format=torch.channels_last)
    x = nhwc(2, 8, 6, 6).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(model(x))  # the first gets float32, which its shortcut adds to bfloat16: stock PyTorch's work
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_an_expanded_gradient_is_copied_once() -> None:
    model, x = block(), nhwc(2, 32, 6, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(x).sum().backward()
    copied = [event for event in profiler.events() if event.name == "aten::clone"]
    assert len(copied) <= 1, copied
