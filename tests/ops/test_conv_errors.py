"""How far convolutions of floats are from fp64, beside a plain sum: the table of docs/numerics.md, at every level.

A plain sum adds product after product in fp32, as eager PyTorch's direct convolutions do. Of 4,608 products it is three
times as far off as sums of short chains. Winograd's transforms cost what short chains gain: with one long chain it
would be three times as far off as a plain sum.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, unfold

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("needs_extension")

FILTERS = 32


def operands(channels: int, kernel: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(8, channels, 8, 8, generator=generator).relu().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(FILTERS, channels, kernel, kernel, generator=generator)
    return x, weight * (2 / (channels * kernel**2)) ** 0.5


def plain_sum(x: Tensor, weight: Tensor) -> Tensor:
    """One chain of fused multiply-adds in fp32, taps outside, channels inside."""
    kernel = weight.shape[-1]
    rows = unfold(x, kernel, padding=kernel // 2).view(len(x), x.shape[1], kernel**2, -1).transpose(1, 2)
    filters = weight.flatten(2).permute(2, 1, 0).flatten(0, 1).double()  # [tap and channel][filter]
    sums = torch.zeros(len(x), x.shape[2] * x.shape[3], FILTERS)
    for product, row in enumerate(rows.flatten(1, 2).double().unbind(1)):
        sums = (sums.double() + row[..., None] * filters[product]).float()
    return sums.transpose(1, 2).reshape(len(x), FILTERS, *x.shape[2:])


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("channels", "kernel", "winograd", "limit"), [(4608, 1, False, 1 / 3), (512, 3, False, 1 / 3), (512, 3, True, 1.25)]
)
def test_long_sums_are_nearer_than_a_plain_sum(
    isa: str, channels: int, kernel: int, winograd: bool, limit: float
) -> None:
    x, weight = operands(channels, kernel)
    conv = nn.Conv2d(channels, FILTERS, kernel, padding=kernel // 2, bias=False)
    conv.weight.data.copy_(weight)
    with fr.numerics.winograd(winograd):
        model = fr.optimize_for_inference(nn.Sequential(conv).eval(), example_input=x)
        got = model(x)
        assert ("winograd" in str(model.explain())) == winograd
    exact = conv2d(x.double(), weight.double(), padding=kernel // 2)
    plain = error(plain_sum(x, weight), exact)
    assert 3e-7 < plain < 3e-6, "the reference is what it is taken for"
    assert error(got, exact) < limit * plain, isa


def test_gradients_of_winograd_are_as_near_as_a_plain_sum(isa: str) -> None:
    dy, transposed = operands(512, 3)
    weight = transposed.transpose(0, 1).flip(2, 3).contiguous()
    x = torch.zeros(8, FILTERS, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradient(winograd: bool) -> Tensor:
        with fr.numerics.winograd(winograd):
            return torch.autograd.grad(fr.ops.conv2d(x, weight, padding=1), x, dy)[0]

    dx = gradient(winograd=True)
    assert not torch.equal(dx, gradient(winograd=False)), "Winograd was taken"
    exact = conv2d(dy.double(), transposed.double(), padding=1)
    assert error(dx, exact) < 1.25 * error(plain_sum(dy, transposed), exact), isa
