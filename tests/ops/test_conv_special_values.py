"""NaN and infinities go where the fp64 convolution takes them, through every kernel and no further."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_resnet import testing
from tests.ops.cases import DTYPES
from tests.ops.conv_problems import Operands, Problem, draw, op, reference, run

pytestmark = pytest.mark.usefixtures("needs_extension")

INF, NAN = float("inf"), float("nan")
# Channels with and without a rest of a vector or of a pair, folded taps, panels of one and two vectors.
PROBLEMS = (
    Problem(3, 3, 7, 7, 5),
    Problem(3, 17, 7, 7, 33),
    Problem(3, 16, 7, 7, 32, (1, 1), padding=(0, 0)),
    Problem(2, 64, 7, 9, 64, stride=(2, 2)),
    Problem(3, 1, 7, 7, 1, (5, 5), padding=(2, 2)),
    Problem(5, 33, 7, 7, 17, (2, 2), padding=(0, 0)),
    Problem(3, 24, 7, 7, 24, groups=6),
)


def _kinds(t: Tensor) -> Tensor:
    t = t.double()
    return torch.where(t.isnan(), 3, torch.where(t == INF, 1, torch.where(t == -INF, 2, 0)))


def _with(t: Tensor, value: float, corner: bool) -> Tensor:
    """`t` with `value` in one middle element, and in the first one."""
    t = t.clone(memory_format=torch.preserve_format)
    t[1, t.shape[1] // 2, t.shape[2] // 2, t.shape[3] // 2] = value
    if corner:
        t[0, 0, 0, 0] = value
    return t


def _assert_kinds(p: Problem, o: Operands, names: tuple[str, ...]) -> None:
    got, expected = run(p, o), reference(p, o)
    for name in names:
        wrong = _kinds(got[name]) != _kinds(expected[name].value)
        assert not wrong.any(), f"{p}: {name} differs in {int(wrong.sum())} of {wrong.numel()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_in_the_input(isa: str, value: float, dtype: torch.dtype) -> None:
    for problem in PROBLEMS:
        p = replace(problem, dtype=dtype)
        o = draw(p)
        o.x = _with(o.x, value, corner=True)
        _assert_kinds(p, o, ("z", "grad_conv_weight"))
        statistics = run(p, o)
        reached = ~statistics["z"].isfinite().all(3).all(2).all(0)
        assert reached.any()
        assert torch.equal(statistics["var"].isfinite(), ~reached)
        assert torch.equal(statistics["mean"].isfinite(), ~reached)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_in_the_gradient(isa: str, value: float, dtype: torch.dtype) -> None:
    for problem in PROBLEMS:
        p = replace(problem, dtype=dtype)
        o = draw(p)
        o.dy = _with(o.dy, value, corner=False)  # beside the padding an infinity times zero is either kernel's choice
        _assert_kinds(p, o, ("grad_x", "grad_conv_weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_gradients_do_not_count_whatever_they_are(isa: str, dtype: torch.dtype) -> None:
    for problem in PROBLEMS:
        p = replace(problem, dtype=dtype, mask=True, skip="masked")
        o = draw(p)
        assert o.mask is not None
        assert o.skip is not None
        assert o.skip_mask is not None
        clean = run(p, o)
        o.dy = torch.where(o.mask, o.dy, NAN)
        o.skip = torch.where(o.skip_mask, o.skip, INF)
        spoiled = run(p, o)
        assert all(torch.equal(clean[key], spoiled[key]) for key in ("grad_x", "grad_conv_weight"))


@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu"])
def test_through_the_inputs_norm(isa: str, act: str) -> None:
    """relu(NaN) is NaN and passes the gradient; relu(-inf) is 0 and blocks it, and -inf as the skip's neighbour too."""
    for value in (NAN, INF, -INF):
        for dtype in DTYPES:
            p = replace(PROBLEMS[1], dtype=dtype, act=act, affine=False)
            o = draw(p)
            o.x = _with(o.x, value, corner=True)
            _assert_kinds(p, o, ("z", "grad_x"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overflow_of_a_narrow_dtype_is_infinite(isa: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((2, 8, 3, 3), largest, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(5, 8, 1, 1, dtype=dtype)
    weight[1::2] = -1
    z = op("conv2d_forward")(x, weight, None, [1, 1], [0, 0], [1, 1], 1)
    assert (z[:, ::2] == INF).all()
    assert (z[:, 1::2] == -INF).all()


def test_the_smallest_numbers_survive(isa: str) -> None:
    """fp16 has subnormal numbers, and products in fp32 keep them."""
    x = torch.full((2, 8, 5, 5), 2.0**-24, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    z = op("conv2d_forward")(x, torch.eye(8, dtype=torch.float16).view(8, 8, 1, 1), None, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(z, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_below_the_normal_numbers_survives(isa: str, dtype: torch.dtype) -> None:
    """Whole tiles are finished in registers, where AVX512_BF16's conversion would make zeros of denormals."""
    torch.manual_seed(0)
    tiny, channels = torch.finfo(dtype).tiny / 4, (3, 20, 40, 63)
    x = torch.randn(2, 16, 7, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 16, 1, 1).to(dtype)
    bias = torch.ones(64, dtype=dtype)
    for channel in channels:
        weight[channel], bias[channel] = 0, tiny
    # Of one channel a single position, in turn each of a tile.
    weight[5], weight[5, 0], bias[5] = 0, 1, tiny
    for position in range(14):
        x[:, 0] = 1
        x[0, 0].view(-1)[position] = 0
        z = op("conv2d_forward")(x, weight, bias, [1, 1], [0, 0], [1, 1], 1)
        assert (z[:, channels] == tiny).all()
        assert z[0, 5].reshape(-1)[position] == tiny
        expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double())
        testing.assert_close(z, expected, reduction_length=17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_in_zeros_out(isa: str, dtype: torch.dtype) -> None:
    p = replace(PROBLEMS[1], dtype=dtype)
    o = draw(p)
    o.x, o.dy = torch.zeros_like(o.x), torch.zeros_like(o.dy)
    got = run(p, o)
    rstd = got.pop("rstd")
    assert not any(value.any() for value in got.values())
    testing.assert_close(rstd, torch.full((33,), 1e-5, dtype=torch.float64).rsqrt())
