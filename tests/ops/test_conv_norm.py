"""Convolutions with the batch norms around them against fp64: forward, statistics, both gradients, every kernel."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_resnet import testing
from fused_resnet.numerics import winograd
from tests.ops.cases import DTYPES
from tests.ops.conv_problems import (
    SLOPE,
    Problem,
    act_number,
    backward,
    backward_data,
    backward_weight,
    check,
    draw,
    forward,
    gradient_arguments,
    normed,
    op,
    output_gradient,
    reference,
    run,
    variants,
)

pytestmark = pytest.mark.usefixtures("needs_extension")

CHANNELS = (1, 3, 13, 17, 33, 65)
# Kernels, strides, paddings and dilations that a ResNet has and that none has.
GEOMETRIES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),  # three of four elements of dx have no tap
    ((7, 7), (2, 2), (3, 3), (1, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (4, 3), (1, 1)),  # windows of nothing but padding
    ((1, 1), (1, 1), (2, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (2, 3), (3, 2), (3, 2)),
    ((1, 7), (1, 2), (0, 3), (1, 1)),
    ((7, 1), (3, 1), (3, 0), (1, 1)),
    ((2, 4), (3, 2), (1, 0), (1, 2)),
    ((4, 2), (2, 1), (3, 2), (1, 1)),
    ((6, 3), (5, 4), (0, 1), (1, 1)),  # windows that leave pixels out
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries_under_every_instruction_set(
    isa: str, geometry: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    for i, (c, k) in enumerate(((3, 17), (33, 13), (16, 64))):
        check(variants(Problem(2, c, 11, 9, k, *geometry), dtype, i + 5 * GEOMETRIES.index(geometry)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_under_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for i, c in enumerate(CHANNELS):
        for j in range(3):
            index = 3 * i + j
            size = ((3, 3), (1, 1), (1, 1)) if index % 2 else ((1, 1), (1 + index % 4 // 2,) * 2, (0, 0))
            check(variants(Problem(2, c, 7, 5, CHANNELS[(i + 2 * j) % 6], *size), dtype, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_small_images_side_by_side(isa: str, n: int, dtype: torch.dtype) -> None:
    """Rows shorter than a register tile: several images are interleaved, the last ones not a full set."""
    for i, extent in enumerate((1, 2, 3, 4, 7)):
        check(variants(Problem(n, 16, extent, extent, 24), dtype, n + 6 * i))
        check(variants(Problem(n, 5, extent, extent + 1, 33, (1, 1), padding=(0, 0)), dtype, n + 6 * i + 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_mask_and_skip(dtype: torch.dtype) -> None:
    for index in range(84):  # 7 activations by 3 output norms by 4 masks
        check(variants(Problem(2, 13, 6, 7, 17), dtype, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extents_that_are_cut_into_blocks(isa: str, dtype: torch.dtype) -> None:
    """Long rows, rows longer than a unit, many units, and a weight whose panels are many."""
    shapes = (
        Problem(1, 3, 2, 1100, 8),
        Problem(2, 16, 40, 37, 16),
        Problem(1, 64, 3, 257, 9, (7, 7), padding=(3, 3)),
        Problem(3, 130, 9, 11, 70, (1, 1), padding=(0, 0)),
        Problem(5, 8, 29, 31, 200, (1, 1), (2, 2), (0, 0)),
    )
    for i, problem in enumerate(shapes):
        check(variants(problem, dtype, 3 * i + 1))


# Channels of a group, and groups: whole and partial vectors of them, one vector or two to a group, and sizes that no
# vector is made of.
GROUPS = ((2, 9), (4, 3), (4, 8), (8, 5), (16, 2), (6, 3), (24, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "groups"), GROUPS)
def test_groups_under_every_instruction_set(isa: str, group: int, groups: int, dtype: torch.dtype) -> None:
    c = group * groups
    for i, geometry in enumerate(GEOMETRIES):
        n, width = ((2, 9), (1, 31), (4, 7), (3, 4))[
            i % 4
        ]  # several images beside each other, and rows of several tiles
        p = Problem(n, c, 8, width, c, *geometry, groups=groups)
        check(variants(p, dtype, 5 * i + group))
        if i % 4 == 2:
            check(variants(replace(p, k=2 * c), dtype, 5 * i + group))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_are_cut_into_blocks(isa: str, dtype: torch.dtype) -> None:
    for i, p in enumerate((Problem(1, 32, 2, 1100, 32, groups=8), Problem(3, 512, 14, 14, 512, groups=64))):
        check(variants(p, dtype, 3 * i + 1))
    check(variants(Problem(2, 256, 30, 28, 256, stride=(2, 2), groups=64), dtype, 8))


@st.composite
def problems(draws: st.DrawFn) -> Problem:
    def pair(strategy: st.SearchStrategy[int]) -> tuple[int, int]:
        return draws(strategy), draws(strategy)

    def dilations(taps: int) -> st.SearchStrategy[int]:
        return st.integers(1, max(1, min(3, 8 // max(taps - 1, 1))))  # what lies farther apart is ATen's

    kernel = pair(st.integers(1, 7))
    groups, widest = 1, st.integers(1, 70)
    if draws(st.booleans()):
        groups = draws(st.integers(2, 20))
        widest = st.just(groups * 2 * draws(st.integers(1, 8)))
    problem = Problem(
        draws(st.integers(1, 5)),
        draws(widest),
        *pair(st.integers(1, 20)),
        draws(widest),
        kernel,
        pair(st.integers(1, 3)),
        (draws(st.integers(0, kernel[0])), draws(st.integers(0, kernel[1]))),
        (draws(dilations(kernel[0])), draws(dilations(kernel[1]))),
        groups=groups,
    )
    return variants(problem, draws(st.sampled_from(DTYPES)), draws(st.integers(0, 10_000)))


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problems().filter(lambda problem: problem.valid))
def test_random_problems(isa: str, problem: Problem) -> None:
    check(problem)


# The first two have pixels enough for slices that threads share, and units that are whole blocks of most kernels.
TOGETHER = (
    Problem(2, 24, 61, 59, 40, (1, 1), padding=(0, 0)),
    Problem(4, 64, 56, 56, 256, (1, 1), padding=(0, 0)),
    Problem(3, 17, 5, 7, 9),
    Problem(2, 16, 9, 8, 12, (1, 1), (2, 2), (0, 0)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_gradients_by_one_operator(isa: str, dtype: torch.dtype) -> None:
    """The bits of the two operators, for any number of threads, whether they run together or not."""
    threads = torch.get_num_threads()
    try:
        for i, problem in enumerate(TOGETHER):
            for index in (7 * i + 1, 7 * i + 2):
                p = variants(problem, dtype, index)
                o = draw(p)
                bias = index % 2 == 0
                weight = op("conv2d_norm_backward_weight")(*gradient_arguments(p, o), *p.geometry, bias)
                want = (*backward_data(p, o), *weight)
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    for name, got, one in zip(
                        ("x", "weight", "bias", "dw", "db"), backward(p, o, bias), want, strict=True
                    ):
                        assert torch.equal(got, one), f"{p} {name} with {count} threads"
    finally:
        torch.set_num_threads(threads)


def test_a_weight_of_floats_is_rounded_where_bfloat16_is_multiplied(isa: str) -> None:
    """As autocast rounds it, to the last bit; other kernels multiply all of its bits."""
    for i, geometry in enumerate(GEOMETRIES[:6]):
        p = replace(variants(Problem(2, 40, 9, 8, 48, *geometry), torch.bfloat16, i), float_weight=True)
        o = draw(p)
        assert not torch.equal(o.weight.bfloat16().float(), o.weight)
        rounded = replace(o, weight=o.weight.bfloat16())
        with winograd(False):
            got = (forward(p, o)[0], backward_data(p, o)[0])
            want = (forward(p, rounded)[0], backward_data(p, rounded)[0])
        same = [torch.equal(a, b) for a, b in zip(got, want, strict=True)]
        pairs = isa == "avx512_bf16" and "amx" not in testing.isa_levels()  # where tiles are fast, pairs are slow
        assert same == [isa == "amx" or pairs] * 2, f"{p} under {isa}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_skip_of_the_forward_pass(isa: str, dtype: torch.dtype) -> None:
    """Both enter before the value is stored, and so its statistics; the bias's gradient is the sum of the output's."""
    for i, geometry in enumerate(GEOMETRIES[:6]):
        p = variants(Problem(2, 13, 11, 9, 17, *geometry), dtype, i)
        o = draw(p)
        bias, skip = testing.draw((p.k,), dtype), testing.draw((p.n, p.k, *p.out), dtype)
        call = (o.x, *normed(o.norm), act_number(p), SLOPE, o.weight, *p.geometry, None, None, True, 1e-5)
        z, mean, _, var = op("conv2d_norm_forward")(*call, bias, skip)
        added = bias.double().view(1, -1, 1, 1) + skip.double()
        plain = reference(p, o)["z"]
        want = replace(plain, value=plain.value + added, scale=plain.scale + added.abs())
        testing.assert_close(z, want, compute_dtype=dtype, name="z")
        exact = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        for got, value in zip((var, mean), exact, strict=True):
            torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
        alone, *none = op("conv2d_norm_forward")(*call[:-4], None, None, False, 1e-5, bias, skip, False)
        assert torch.equal(alone, z)
        assert [t.numel() for t in none] == [0, 0, 0]

        weight, grad_bias = op("conv2d_norm_backward_weight")(*gradient_arguments(p, o), *p.geometry, True)
        assert torch.equal(weight, backward_weight(p, o))
        dz = output_gradient(p, o)
        count = p.n * p.out[0] * p.out[1]
        sums = testing.Reference(dz.value.sum((0, 2, 3)), dz.scale.sum((0, 2, 3)), count)
        testing.assert_close(grad_bias, sums, name="grad_bias")


@pytest.mark.parametrize("name", ["z", "mean", "var", "grad_x", "grad_weight", "grad_bias", "grad_conv_weight"])
def test_the_comparison_sees_one_wrong_element(name: str) -> None:
    problem = Problem(2, 13, 6, 7, 17, act="silu", output_norm="train", mask=True)
    o = draw(problem)
    got, expected = run(problem, o), reference(problem, o)
    largest = expected[name].value.abs().argmax()
    wrong = got[name].double().contiguous()
    wrong.view(-1)[largest] *= 1.03
    with pytest.raises(AssertionError, match="1 of"):
        testing.assert_close(wrong.to(got[name].dtype), expected[name], compute_dtype=problem.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_convolution_and_its_gradients(isa: str, dtype: torch.dtype) -> None:
    for i, geometry in enumerate(GEOMETRIES):
        p = replace(Problem(3, (9, 16, 33)[i % 3], 11, 9, (13, 64)[i % 2], *geometry), dtype=dtype, seed=i)
        o = draw(replace(p, weight_layout=("NCHW", "NHWC")[i % 2]))
        bias = testing.draw((p.k,), dtype)
        expected = reference(p, o)
        z = op("conv2d_forward")(o.x, o.weight, bias, *p.geometry)
        grads = op("conv2d_backward")(o.dy, o.x, o.weight, True, *p.geometry, [True, True, True])
        column = bias.double().view(1, -1, 1, 1)
        plain = expected["z"]
        testing.assert_close(z, replace(plain, value=plain.value + column, scale=plain.scale + column.abs()), name="y")
        testing.assert_close(grads[0], expected["grad_x"], name="grad_x")
        testing.assert_close(grads[1], expected["grad_conv_weight"], name="grad_weight")
        dy = o.dy.double()
        sums = testing.Reference(dy.sum((0, 2, 3)), dy.abs().sum((0, 2, 3)), dy.numel() // p.k)
        testing.assert_close(grads[2], sums, compute_dtype=dtype, name="grad_bias")
        assert grads[1].stride() == o.weight.stride()
        assert z.is_contiguous(memory_format=torch.channels_last)
        for wanted in ([True, False, False], [False, True, False], [False, False, True]):
            some = op("conv2d_backward")(o.dy, o.x, o.weight, wanted[2], *p.geometry, wanted)
            for full, one, yes in zip(grads, some, wanted, strict=True):
                assert torch.equal(full, one) if yes else one.numel() == 0
