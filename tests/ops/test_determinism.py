"""The same bits for any number of threads and from run to run, outputs and every gradient."""

import pytest
import torch

import fused_resnet as fr
from tests.ops.cases import DTYPES, LAYOUTS, Case, make, run

# Large enough to be shared among threads; extents that no thread count divides.
SHAPES = ((8, 64, 28, 28), (7, 3, 67, 61), (3, 728, 9, 7), (130, 1, 17, 13))
THREADS = (1, 2, 5, 3)

pytestmark = pytest.mark.usefixtures("needs_extension")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["plain", "residual", "dual", "max_pool"])
def test_bits_do_not_depend_on_threads(op: str, dtype: torch.dtype, layout: str) -> None:
    for i, shape in enumerate(SHAPES):
        for mode in ("train", "eval"):
            operands = make(Case(op, shape, dtype, layout, ("silu", "identity", "tanh")[i % 3], mode))
            results = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                results.append(run(operands))
            for threads, result in zip(THREADS[1:], results[1:], strict=True):
                for key, value in results[0].items():
                    same = torch.equal(result[key], value)
                    assert same, f"{operands.case}: {key} differs between 1 and {threads} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_and_slope_gradients_do_not_depend_on_threads(layout: str) -> None:
    for op in ("plain", "residual", "dual", "max_pool"):
        for act in ("relu", "leaky_relu", "prelu"):
            operands = make(Case(op, (5, 33, 29, 31), torch.float32, layout, act))
            results = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                results.append(run(operands))
            for result in results[1:]:
                assert all(torch.equal(result[key], value) for key, value in results[0].items()), (op, act)


@pytest.mark.parametrize(("channels", "extent"), [(64, 28), (256, 14)])
def test_weight_gradients_of_whole_blocks_do_not_depend_on_threads(channels: int, extent: int) -> None:
    """Threads share filters and channels that begin anywhere, with masks behind them."""
    block = fr.nn.BasicBlock(channels, channels).to(memory_format=torch.channels_last).train()
    x = torch.randn(3, channels, extent, extent).to(memory_format=torch.channels_last)
    results = []
    for threads in (*THREADS, 7):
        torch.set_num_threads(threads)
        block.zero_grad()
        block(x).square().sum().backward()
        results.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("scale", [3.4e12, 1e15, 6e15])
def test_who_computes_what_cannot_be_transformed_does_not_depend_on_threads(scale: float) -> None:
    """Values around those from which on Winograd's algorithm is not used."""
    x, dy = (torch.randn(2, 128, 14, 14).to(memory_format=torch.channels_last) for _ in range(2))
    dy[1, 77, 3, 5] = scale
    weight = torch.randn(128, 128, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        wanted = [False, True, False]
        results.append(torch.ops.fused_resnet.conv2d_backward.default(dy, x, weight, False, *geometry, wanted)[1])
    assert all(torch.equal(result, results[0]) for result in results)


def test_bits_do_not_change_from_run_to_run() -> None:
    operands = make(Case("residual", (8, 64, 28, 28), torch.bfloat16))
    first = run(operands)
    for _ in range(5):
        again = run(operands)
        assert all(torch.equal(again[key], value) for key, value in first.items())
