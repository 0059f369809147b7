"""The same bits for any number of threads and from run to run, outputs and every gradient."""

import pytest
import torch

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


def test_bits_do_not_change_from_run_to_run() -> None:
    operands = make(Case("residual", (8, 64, 28, 28), torch.bfloat16))
    first = run(operands)
    for _ in range(5):
        again = run(operands)
        assert all(torch.equal(again[key], value) for key, value in first.items())
