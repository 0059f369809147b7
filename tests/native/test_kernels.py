"""Every line of ``kernels.inc`` that this host supports is run and compared with fp64."""

import pytest
import torch

import fused_resnet as fr
from fused_resnet import _extension, testing
from fused_resnet.inference import graph as g
from fused_resnet.inference.plan import Plan
from fused_resnet.inference.weights import Weights
from tests.ops.cases import LAYOUTS, Case, check

ROWS = _extension.extension().kernel_table() if _extension.available() else []
# Which operators, forward and backward, reach a pass.
OPS = {"batch_norm": ("plain", "residual", "dual"), "pool": ("max_pool",)}
PASSES = {
    "batch_norm": {"stats", "apply", "backward_reduce", "backward_apply"},
    "pool": {"forward", "backward_reduce", "backward_apply"},
    "conv": {
        "convolve",
        "pack",
        "weight_gradient",
        "winograd",
        "winograd_pack",
        "winograd_weight",
        "grouped",
        "grouped_pack",
        "grouped_weight",
    },
    "window": {"max", "mean"},
}


def test_the_table_is_complete_and_names_its_rows() -> None:
    if not ROWS:
        pytest.skip(str(_extension.why_unavailable()))
    assert {op: {row["pass"] for row in ROWS if row["op"] == op} for op in PASSES} == PASSES
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["name"].endswith(f"_{row['isa']}"), row
        assert row["supported"] == (row["isa"] in testing.isa_levels()), row
    scalar = {(row["op"], row["pass"], row["dtype"]) for row in ROWS if row["isa"] == "scalar"}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    every = {(op, name, dtype) for op, names in PASSES.items() for name in names for dtype in dtypes}
    single = {row for row in every if row[1].startswith("winograd") and row[2] == "float64"}  # not for doubles
    shared = {row for row in every if row[1].startswith("grouped")}  # one lane holds no two groups
    assert scalar == every - single - shared


def check_convolution(width: int, dtype: torch.dtype) -> None:
    """Forward and gradients of 3x3 convolutions, with Winograd in fp32 and without, of a 1x1, and in groups."""
    generator = torch.Generator().manual_seed(width)
    # docs/numerics.md: the longest sum is that of a weight's gradient.
    noise = (8 + (4 * 28 * width) ** 0.5) * (2.0**-53 if dtype is torch.float64 else 2.0**-24)
    x = torch.randn(4, 32, 28, width, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    for kernel, winograd, groups in ((3, True, 1), (3, False, 1), (1, True, 1), (3, True, 8)):
        weight = torch.randn(32, 32 // groups, kernel, kernel, generator=generator).to(dtype) / (8 * kernel)
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        want = torch.nn.functional.conv2d(*exact, padding=kernel // 2, groups=groups)
        # Floats in parts wherever there are tiles: at this size they would not pay.
        with fr.numerics.winograd(winograd), fr.numerics.split_bfloat16(True):
            got = fr.ops.conv2d(*leaves, padding=kernel // 2, groups=groups)
            seed = torch.randn(got.shape, generator=generator).to(dtype)
            grads = torch.autograd.grad(got, leaves, seed)
        wants = torch.autograd.grad(want, exact, seed.double())
        for result, reference in zip((got, *grads), (want, *wants), strict=True):
            error = (result.double() - reference).norm() / reference.norm()
            assert error <= torch.finfo(dtype).eps + noise


def check_windows(width: int, dtype: torch.dtype) -> None:
    """A maximum, and a mean of it, as an inference plan runs them."""
    steps = (g.MaxPool("max", (0,), 1, (3, 3), (1, 1), (1, 1)), g.AvgPool("mean", (1,), 2, (2, 2), (1, 1)))
    graph = g.Graph(steps, 0, (2,), None, {}, 5)
    x = testing.draw((2, 5, 9, width), dtype, generator=torch.Generator().manual_seed(width), channels_last=True)
    got = Plan(graph, tuple(x.shape), Weights(graph, dtype), numerics=(True, 3, False))(x)[0]
    want = torch.nn.functional.avg_pool2d(torch.nn.functional.max_pool2d(x.double(), 3, 1, 1), 2, 1)
    testing.assert_close(got, want, reduction_length=4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_kernel(row: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    if not row["supported"]:
        pytest.skip(f"this host has no {row['isa']}")
    extension = _extension.extension()
    dtype = getattr(torch, row["dtype"])
    # An extent no other test uses: the verbose mode speaks once for each extent and instruction set.
    width = 11 + ROWS.index(row)
    extension.set_verbose(True)
    try:
        with testing.isa_cap(row["isa"]):
            if row["op"] == "conv":
                check_convolution(width, dtype)
            if row["op"] == "window":
                check_windows(width, dtype)
            for op in OPS.get(row["op"], ()):
                for i, layout in enumerate(LAYOUTS):
                    check(Case(op, (3, 5, 3, width), dtype, layout, ("relu", "silu")[i]))
                    check(Case(op, (2, width, 3, 5), dtype, layout, ("silu", "leaky_relu")[i]))
    finally:
        extension.set_verbose(False)
    assert row["name"] in capfd.readouterr().err, f"{row['name']} did not say that it ran"
