"""Layouts of convolution operands, nothing written to them, empty tensors, and the same bits for every thread count."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.ops.cases import DTYPES
from tests.ops.conv_problems import (
    Operands,
    Problem,
    backward,
    draw,
    forward,
    gradient_arguments,
    op,
    run,
    variants,
)

pytestmark = pytest.mark.usefixtures("needs_extension")

IMAGES = ("x", "dy", "z", "skip")


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _channel_slice(t: Tensor) -> Tensor:
    big = t.new_full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), 7.0).contiguous(memory_format=torch.channels_last)
    big[:, 2:-1] = t
    return big[:, 2:-1]


def _every_second_column(t: Tensor) -> Tensor:
    big = t.new_full((*t.shape[:3], 2 * t.shape[3]), float("nan")).contiguous(memory_format=torch.channels_last)
    big[..., ::2] = t
    return big[..., ::2]


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 3).contiguous().transpose(0, 3)


def _misaligned(t: Tensor) -> Tensor:
    flat = t.new_empty(t.numel() + 1)
    return torch.as_strided(flat, t.shape, t.stride(), 1).copy_(t)


ARRANGEMENTS: tuple[Callable[[Tensor], Tensor], ...] = (
    _contiguous,
    _channel_slice,
    _every_second_column,
    _transposed,
    _misaligned,
)
PROBLEMS = (
    Problem(2, 13, 6, 7, 17, act="relu", output_norm="train", mask=True),
    Problem(2, 16, 6, 7, 32, (1, 1), padding=(0, 0), output_norm="eval", skip="masked"),
    Problem(3, 3, 9, 8, 8, stride=(2, 2), skip="plain"),
    Problem(2, 8, 7, 7, 24, act="silu", mask=True),
    Problem(2, 24, 7, 7, 24, act="relu", output_norm="train", groups=6),
)


def _assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: object) -> None:
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"{what}: {name} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrange", ARRANGEMENTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("problem", PROBLEMS, ids=range(len(PROBLEMS)))
def test_strides_change_no_bit_and_nothing_is_written(
    problem: Problem, arrange: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    p = replace(problem, dtype=dtype)
    o = draw(p)
    want = run(p, o)
    given = {name: arrange(t) for name in (*IMAGES, "weight") if isinstance(t := getattr(o, name), Tensor)}
    before = {name: t.clone() for name, t in vars(o).items() if isinstance(t, Tensor)}
    for name, t in given.items():
        assert torch.equal(t, getattr(o, name))
        _assert_same(want, run(p, replace(o, **{name: t})), name)
    for name, t in before.items():
        assert torch.equal(t, getattr(o, name)), f"{name} was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients_and_statistics(dtype: torch.dtype) -> None:
    for problem in PROBLEMS:
        p = replace(problem, dtype=dtype)
        o = draw(p)
        one = torch.full((), 0.5, dtype=dtype).expand(o.dy.shape)
        rows = o.dy[:, :, :1, :1].expand(o.dy.shape)
        for expanded in (one, rows):
            dense = expanded.clone(memory_format=torch.contiguous_format)
            _assert_same(run(p, replace(o, dy=dense)), run(p, replace(o, dy=expanded)), p)
        if o.norm is not None:
            norm = replace(o.norm, mean=o.norm.mean[:1].expand(p.c), weight=o.norm.mean.new_ones(()).expand(p.c))
            dense_norm = replace(norm, mean=norm.mean.clone(), weight=norm.mean.new_ones(p.c))
            _assert_same(run(p, replace(o, norm=dense_norm)), run(p, replace(o, norm=norm)), p)


def test_parameters_of_the_activations_dtype_are_converted_exactly() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        p = replace(PROBLEMS[0], dtype=dtype)
        o = draw(p)
        assert o.norm is not None
        assert o.norm.weight is not None
        assert o.norm.bias is not None
        narrow = replace(o.norm, weight=o.norm.weight.to(dtype), bias=o.norm.bias.to(dtype))
        wide = replace(narrow, weight=o.norm.weight.to(dtype).float(), bias=o.norm.bias.to(dtype).float())
        _assert_same(run(p, replace(o, norm=wide)), run(p, replace(o, norm=narrow)), dtype)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3)], ids=str)
def test_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    n, c, h, w = shape
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, c, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    norm = (torch.zeros(c), torch.ones(c), None, None, 1, 0.01)
    z, mean, rstd, var = op("conv2d_norm_forward")(x, *norm, weight, *geometry, None, None, True, 1e-5)
    assert z.shape == (n, 6, h, w)
    assert not z.any()
    assert mean.shape == rstd.shape == var.shape == (6,)
    dy = torch.randn(z.shape)
    gradient = (dy, None, None, None, None, None, None, None, False, weight, x, *norm)
    grad_x, grad_weight, grad_bias = op("conv2d_norm_backward_data")(*gradient, None, None, *geometry)
    assert grad_x.shape == x.shape
    assert not grad_x.any()
    assert torch.equal(grad_weight, torch.zeros(c))
    assert torch.equal(grad_bias, torch.zeros(c))
    grad_weight, grad_bias = op("conv2d_norm_backward_weight")(*gradient, *geometry, True)
    assert torch.equal(grad_weight, torch.zeros_like(weight))
    assert torch.equal(grad_bias, torch.zeros(6))


def test_an_empty_batch_through_autograd() -> None:
    x = torch.randn(0, 5, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 5, 3, 3).requires_grad_()
    y = fr.ops.conv2d(x, weight, padding=1)
    y.sum().backward()
    assert y.shape == (0, 6, 4, 3)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert not weight.grad.any()


# Large enough to be shared among threads, as units, as filters and as slices; extents that no thread count divides.
SHARED = (
    Problem(5, 32, 28, 28, 48),
    Problem(3, 65, 17, 19, 33, stride=(2, 2)),
    Problem(7, 128, 7, 7, 130, (1, 1), padding=(0, 0)),
    Problem(2, 3, 61, 67, 16, (7, 7), (2, 2), (3, 3)),
    Problem(1, 512, 4, 4, 300),
    Problem(4, 128, 28, 28, 128, groups=32),
    Problem(2, 64, 29, 31, 64, stride=(2, 2), groups=8),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SHARED, ids=range(len(SHARED)))
def test_bits_do_not_depend_on_threads(isa: str, problem: Problem, dtype: torch.dtype) -> None:
    for index in (0, 8, 15):
        p = variants(problem, dtype, index + SHARED.index(problem))
        o = draw(p)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(p, o) | _biased(p, o))
        _assert_same(results[0], results[1], f"{p}, 2 threads")
        _assert_same(results[0], results[2], f"{p}, 3 threads")
        _assert_same(results[2], run(p, o) | _biased(p, o), f"{p}, again")


def _biased(p: Problem, o: Operands) -> dict[str, Tensor]:
    bias = torch.linspace(-1, 1, p.k).to(p.dtype)
    weight = o.weight.to(p.dtype)
    y = op("conv2d_forward")(o.x, weight, bias, *p.geometry)
    grads = op("conv2d_backward")(o.dy, o.x, weight, True, *p.geometry, [True, True, True])
    return {"conv2d": y, "dx": grads[0], "dweight": grads[1], "dbias": grads[2]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", ["x", "weight", "dy", "mask", "skip"])
def test_operands_that_do_not_fit_are_refused(wrong: str, dtype: torch.dtype) -> None:
    """An operator reads memory by the shapes of others: what does not match must raise and never be read."""
    p = Problem(2, 16, 6, 7, 8, mask=True, skip="masked")
    o = draw(p)
    if wrong == "mask":
        assert o.mask is not None
        spoiled = replace(o, mask=o.mask[:, :, :-1])
    else:
        spoiled = replace(o, **{wrong: getattr(o, wrong).to(dtype)})
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(p, spoiled),
        "data": lambda: op("conv2d_norm_backward_data")(
            *gradient_arguments(p, spoiled), spoiled.skip, None, *p.geometry
        ),
        "weight": lambda: op("conv2d_norm_backward_weight")(*gradient_arguments(p, spoiled), *p.geometry),
        "both": lambda: backward(p, spoiled),
    }
    reads = {
        "x": "forward weight both",
        "weight": "forward data both",
        "dy": "data weight both",
        "mask": "data weight both",
        "skip": "data both",
    }
    for name in reads[wrong].split():
        if wrong == "x" and dtype == torch.bfloat16 and name == "forward":
            continue  # a weight of floats is allowed to it
        operator = {"forward": "forward", "both": "backward"}.get(name, f"backward_{name}")
        with pytest.raises(RuntimeError, match=f"conv2d_norm_{operator}: expected"):
            calls[name]()
