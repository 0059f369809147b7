"""Statistics that a convolution sums of its own output: large means, constants, rounding, huge values, frozen."""

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import testing
from tests.ops.cases import DTYPES
from tests.ops.conv_problems import Operands, Problem, channels_last, draw, forward, op

pytestmark = pytest.mark.usefixtures("needs_extension")

# The sums are of z minus one of its values: a few standard deviations off cost a digit (batch_norm's bound is 1e-6).
CLOSE = 3e-5


def _identity(c: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.eye(c, dtype=dtype).view(c, c, 1, 1)


def _convolve(x: Tensor, weight: Tensor, padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, mean, rstd and var, in double."""
    geometry = ([1, 1], [padding, padding], [1, 1], 1)
    plain = (None, None, None, None, 0, 0.01)
    found = op("conv2d_norm_forward")(channels_last(x), *plain, weight, *geometry, None, None, True, 1e-5)
    z, mean, rstd, var = (t.double() for t in found)
    return z, mean, rstd, var


def _assert_exact(x: Tensor) -> None:
    """The identity as a convolution: z is x, so all that errs are the statistics."""
    z, mean, rstd, var = _convolve(x, _identity(x.shape[1]))
    assert torch.equal(z, x.double())
    exact_mean, exact_var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    assert ((var - exact_var).abs() / exact_var).max() <= CLOSE
    assert ((mean - exact_mean).abs() <= CLOSE * (exact_mean.abs() * 1e-2 + exact_var.sqrt())).all()
    assert ((rstd - (exact_var + 1e-5).rsqrt()).abs() * exact_var.sqrt()).max() <= CLOSE


@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e4])
def test_variance_at_a_large_mean(isa: str, ratio: float) -> None:
    for shape in ((8, 32, 28, 28), (8, 13, 7, 5), (32, 64, 7, 7), (2, 3, 112, 112)):
        _assert_exact(testing.draw(shape, torch.float32, mean=ratio))


def test_variance_with_a_trend_over_the_batch(isa: str) -> None:
    _assert_exact(torch.randn(16, 24, 20, 20) + torch.linspace(-1e3, 1e3, 16).view(-1, 1, 1, 1))


def test_borders_at_another_level(isa: str) -> None:
    mean = torch.full((8, 16, 28, 28), 50.0)
    mean[:, :, 0], mean[:, :, -1] = 50.0 * 2 / 3, 50.0 * 2 / 3
    mean[:, :, :, 0] *= 2 / 3
    mean[:, :, :, -1] *= 2 / 3
    for scale in (1.0, 0.1, 10.0):
        _assert_exact(mean + torch.randn(mean.shape) * scale)


def test_first_values_far_from_the_rest(isa: str) -> None:
    """An outlier at the very start must not become the shift of everything."""
    x = torch.randn(4, 5, 40, 40)
    x[0, :, 0, 0] = 300.0
    _assert_exact(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels_are_normalised_to_zero(isa: str, dtype: torch.dtype) -> None:
    """As in eager: z is one number, and the mean is that very number, whatever z was before it was rounded."""
    for value, weight in ((1.3, 0.37), (-7.0, 3.3e2), (0.0, 1.0)):
        for shape in ((4, 8, 9, 7), (3, 16, 40, 40)):
            x = torch.full(shape, value, dtype=torch.float64).to(dtype)
            w = torch.full((6, shape[1], 1, 1), weight, dtype=torch.float64).to(dtype)
            z, mean, _, var = _convolve(x, w)
            assert z.unique().numel() == 1
            assert not var.any()
            assert torch.equal(mean, z[0, :, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_stored_has_the_statistics(isa: str, dtype: torch.dtype) -> None:
    """The next operator normalises z as stored: mean 0 and variance 1, even where rounding is most of the variance."""
    for std in (1.0, 0.02, 0.005):
        x = testing.draw((4, 8, 28, 28), dtype, mean=10.0, std=std)
        weight = torch.full((6, 8, 1, 1), 0.1, dtype=torch.float64).to(dtype)
        z, mean, rstd, _ = _convolve(x, weight)
        xhat = (z - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1)
        exact = z.var((0, 2, 3), unbiased=False)
        wanted = (exact / (exact + 1e-5)).sqrt()
        assert (xhat.mean((0, 2, 3)).abs() <= 0.01).all(), (std, xhat.mean((0, 2, 3)))
        got = xhat.square().mean((0, 2, 3)).sqrt()
        assert ((got - wanted).abs() <= 0.01).all(), (std, got, wanted)


def test_huge_values_are_finite_and_right(isa: str) -> None:
    """Squares beyond fp32: the channel is summed once more in fp64."""
    for std in (1e18, 1e19, 1e25, 1e30):
        x = testing.draw((4, 7, 9, 11), torch.float32, std=std)
        z, mean, rstd, _ = _convolve(x, testing.draw((5, 7, 3, 3), torch.float32), 1)
        exact = z.var((0, 2, 3), unbiased=False)
        assert ((rstd * exact.sqrt() - 1).abs() <= CLOSE).all()
        assert ((mean - z.mean((0, 2, 3))).abs() <= 1e-6 * exact.sqrt()).all()


def test_one_huge_channel_leaves_the_others_alone(isa: str) -> None:
    x = testing.draw((4, 7, 9, 11), torch.float32)
    want = _convolve(x, _identity(7))
    x[:, 3] *= 1e25
    got = _convolve(x, _identity(7))
    others = torch.arange(7) != 3
    assert all(torch.equal(a[others], b[others]) for a, b in zip(want[1:], got[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_statistics_are_read_and_kept(isa: str, dtype: torch.dtype) -> None:
    p = Problem(2, 13, 6, 7, 17, dtype=dtype, act="relu")
    o = draw(p)
    stat = testing.accumulator(dtype)
    running_mean, running_var = torch.randn(17, dtype=stat), torch.rand(17, dtype=stat) + 0.5
    before = running_mean.clone(), running_var.clone()
    z, mean, rstd, var = forward(p, o, training=False, eps=0.25, running_mean=running_mean, running_var=running_var)
    assert torch.equal(z, forward(p, o)[0])
    assert torch.equal(mean, running_mean)
    exact = (running_var.double() + 0.25).rsqrt()
    testing.assert_close(rstd, exact, scale=exact)
    assert var.numel() == 0
    assert torch.equal(before[0], running_mean)
    assert torch.equal(before[1], running_var)
    again = forward(p, o, running_mean=running_mean, running_var=running_var)
    assert all(torch.equal(a, b) for a, b in zip(forward(p, o), again, strict=True))
    assert torch.equal(before[0], running_mean), "training does not write the running statistics: another operator does"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_eager_batch_norm_agrees(dtype: torch.dtype) -> None:
    p = Problem(5, 16, 14, 14, 24, stride=(2, 2), dtype=dtype)
    o: Operands = draw(p)
    z, mean, rstd, var = forward(p, o)
    norm = nn.BatchNorm2d(24, affine=False, momentum=1.0, dtype=dtype)
    y = norm(z)
    count = z.numel() // 24
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var * (count / (count - 1)), norm.running_var, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((z - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1), y, rtol=1e-5, atol=1e-5)
