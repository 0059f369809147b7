"""Statistics where stock PyTorch loses digits: large means, constant channels, huge and tiny values."""

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from tests.ops.cases import LAYOUTS

pytestmark = pytest.mark.usefixtures("needs_extension")


def _image(values: Tensor, layout: str) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else values


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance as the operator sees them, read from running statistics of momentum 1."""
    c = x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype)
    fr.ops.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    count = x.numel() // c
    return mean, var.double() * ((count - 1) / count)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 64, 56, 56), (8, 13, 7, 5), (32, 512, 7, 7), (2, 3, 224, 224)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e4])
def test_variance_at_a_large_mean(ratio: float, shape: tuple[int, ...], layout: str) -> None:
    x = _image(testing.draw(shape, torch.float32, mean=ratio, std=1.0), layout)
    mean, var = _batch_statistics(x)
    exact_mean = x.double().mean((0, 2, 3))
    exact_var = x.double().var((0, 2, 3), unbiased=False)
    assert ((var - exact_var).abs() / exact_var).max() <= 1e-6
    assert ((mean - exact_mean).abs() / (exact_mean.abs() + 1)).max() <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_with_a_trend_over_the_batch(layout: str) -> None:
    """Every image at another level: a shift taken from the first values alone fits none of the others."""
    x = torch.randn(16, 24, 20, 20) + torch.linspace(-1e3, 1e3, 16).view(-1, 1, 1, 1)
    mean, var = _batch_statistics(_image(x, layout))
    exact = x.double().var((0, 2, 3), unbiased=False)
    assert ((var - exact).abs() / exact).max() <= 1e-6
    assert ((mean - x.double().mean((0, 2, 3))).abs() <= 1e-6 * 1e3).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_borders_at_another_level(layout: str) -> None:
    """What a zero-padded convolution gives for an input with a mean: corner and border must not become the shift."""
    mean = torch.full((8, 16, 56, 56), 50.0)
    mean[:, :, 0], mean[:, :, -1] = 50.0 * 2 / 3, 50.0 * 2 / 3
    mean[:, :, :, 0] *= 2 / 3
    mean[:, :, :, -1] *= 2 / 3
    for scale in (1.0, 0.1, 10.0):
        x = mean + torch.randn(mean.shape) * scale
        _, var = _batch_statistics(_image(x, layout))
        exact = x.double().var((0, 2, 3), unbiased=False)
        assert ((var - exact).abs() / exact).max() <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_values_far_from_the_rest(layout: str) -> None:
    """An outlier at the very start must not become the shift of everything."""
    x = torch.randn(4, 5, 40, 40)
    x[0, :, 0, 0] = 300.0
    _, var = _batch_statistics(_image(x, layout))
    exact = x.double().var((0, 2, 3), unbiased=False)
    assert ((var - exact).abs() / exact).max() <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [1e10, -3.3e4, 0.1, 7.0])
def test_constant_channels_give_the_bias(value: float, layout: str) -> None:
    for shape in ((4, 6, 9, 7), (16, 32, 28, 28)):
        x = _image(torch.full(shape, value), layout).requires_grad_()
        bias = torch.arange(shape[1], dtype=torch.float32)
        y = fr.ops.batch_norm_act(x, None, None, torch.full((shape[1],), 2.0), bias, training=True, act="identity")
        assert torch.equal(y, bias.view(1, -1, 1, 1).expand(shape))
        mean, var = _batch_statistics(x.detach())
        assert torch.equal(mean, torch.full_like(mean, value))
        assert not var.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_values_are_finite_and_right(layout: str) -> None:
    """Squares of 1e18 still fit fp32; what stock PyTorch makes of 1e30 (zeros) is the subject of the next test."""
    for std in (1e15, 1e-15):
        x = _image(testing.draw((4, 7, 9, 11), torch.float32, std=std), layout)
        y = fr.ops.batch_norm_act(x, None, None, training=True, act="identity", eps=1e-45)
        wide = x.double()
        exact = (wide - wide.mean((0, 2, 3), keepdim=True)) / (wide.var((0, 2, 3), unbiased=False, keepdim=True)).sqrt()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_values_are_finite_and_right(layout: str) -> None:
    x = _image(testing.draw((4, 7, 9, 11), torch.float32, std=1e30), layout).requires_grad_()
    y = fr.ops.batch_norm_act(x, None, None, training=True, act="identity")
    wide = x.detach().double()
    exact = (wide - wide.mean((0, 2, 3), keepdim=True)) / (wide.var((0, 2, 3), unbiased=False, keepdim=True)).sqrt()
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-5, atol=1e-5)
    y.backward(torch.randn(y.shape))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.5, 1.5])
def test_any_momentum(momentum: float, layout: str) -> None:
    x = _image(testing.draw((4, 5, 6, 7), torch.float32), layout)
    old_mean, old_var = torch.randn(5), torch.rand(5) + 0.5
    mean, var = old_mean.clone(), old_var.clone()
    fr.ops.batch_norm_act(x, mean, var, training=True, momentum=momentum)
    exact = testing.reference_batch_norm_act(x, testing.Norm(old_mean, old_var, momentum=momentum))
    testing.assert_close(mean, exact["running_mean"], name="running_mean")
    testing.assert_close(var, exact["running_var"], name="running_var")


def test_running_statistics_of_the_activations_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = testing.draw((8, 5, 6, 7), dtype, mean=0.5)
        mean, var = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
        old_mean, old_var = mean.clone(), var.clone()
        fr.ops.batch_norm_act(x, mean, var, training=True, momentum=0.25)
        exact = testing.reference_batch_norm_act(x, testing.Norm(old_mean, old_var, momentum=0.25))
        testing.assert_close(mean, exact["running_mean"], name="running_mean")
        testing.assert_close(var, exact["running_var"], name="running_var")
