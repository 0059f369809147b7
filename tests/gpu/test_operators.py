"""The batch-norm family and add_act against fp64, through the cases of tests/ops with operands on the GPU."""

from dataclasses import replace

import pytest
import torch

import fused_resnet as fr
from fused_resnet import testing
from tests.ops import test_autograd as autograd
from tests.ops import test_shapes as shapes
from tests.ops.cases import DTYPES, LAYOUTS, MODES, OPS, Case, Operands, check, grid, make
from tests.ops.test_gradients import SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

CHANNELS = (1, 3, 13, 65, 728)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_activation_mode_and_layout(op: str, dtype: torch.dtype) -> None:
    combinations = grid(
        op=(op,), shape=((0, 0, 0, 0),), dtype=(dtype,), act=testing.ACTIVATIONS, mode=MODES, layout=LAYOUTS
    )
    for i, case in enumerate(combinations):
        check(replace(case, shape=SHAPES[i % len(SHAPES)], narrow_parameters=i % 3 == 0))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_counts(dtype: torch.dtype, channels: int) -> None:
    for op in OPS:
        for layout in LAYOUTS:
            for mode in ("train", "eval"):
                check(Case(op, (4, channels, 9, 7), dtype, layout, "relu", mode))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(dtype: torch.dtype) -> None:
    shapes.test_tails("whatever this GPU has", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks(dtype: torch.dtype, layout: str) -> None:
    """More values per channel than one block sums: ResNet's stem, a long plane, many images."""
    for op, shape in (("plain", (8, 64, 112, 112)), ("dual", (2, 3, 600, 601)), ("max_pool", (260, 5, 33, 31))):
        operands = make(Case(op, shape, dtype, layout, "silu"))  # no kink, no need to nudge operands away from it
        shapes.compare(operands, shapes.run(operands), shapes.reference(operands))


def _gradcheck_operands(op: str, act: str, mode: str, layout: str, device: torch.device) -> Operands:
    with torch.device("cpu"):
        return autograd._far_from_kinks(op, act, mode, layout).to(device)


@pytest.mark.parametrize("act", testing.ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, act: str, on_device: torch.device) -> None:
    for i, mode in enumerate(autograd.MODES):
        function, leaves = autograd._function(_gradcheck_operands(op, act, mode, LAYOUTS[i % 2], on_device))
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-10), (op, act, mode)
    function, leaves = autograd._function(_gradcheck_operands(op, act, "train", "NHWC", on_device))
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, nondet_tol=1e-10), (op, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_is_pytorchs(layout: str, dtype: torch.dtype, on_device: torch.device) -> None:
    x, weight = testing.draw((2, 16, 11, 9), dtype), testing.draw((24, 8, 3, 3), dtype)
    if layout == "NHWC":
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    results = []
    for function in (fr.ops.conv2d, torch.nn.functional.conv2d):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight)]
        y = function(*leaves, stride=2, padding=1, groups=2)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        exact = on_device.type == "cuda"  # on a CPU narrow convolutions are computed in fp32
        bound = 0.0 if exact else 16 * testing.unit_roundoff(dtype) * float(theirs.abs().max())
        assert (ours.double() - theirs.double()).abs().max() <= bound


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_eagers_dtypes(narrow: torch.dtype, op: str, on_device: torch.device) -> None:
    """On its own each batch norm keeps the dtype of its input; a convolution is cast."""
    operands = make(Case(op, (2, 5, 6, 4), torch.float32, "NHWC", "relu"))
    exact = shapes.run(operands)
    y_dtype = narrow if op == "conv" else torch.float32
    operands.grad_output = operands.grad_output.to(y_dtype)
    with torch.autocast(on_device.type, narrow):
        got = shapes.run(operands)
    for key, value in exact.items():
        assert got[key].dtype == (y_dtype if key == "y" else value.dtype), key
