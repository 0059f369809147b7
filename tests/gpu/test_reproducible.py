"""The same bits at every run: repeated, on another stream, on a busy GPU, on a second one."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import DTYPES, LAYOUTS, Case, Operands, Results, make, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

OPS = ("plain", "residual", "dual", "max_pool")
# Many chunks per channel, few channels, many channels, and extents that nothing divides.
SHAPES = ((16, 64, 56, 56), (7, 3, 167, 161), (3, 728, 19, 17), (130, 1, 17, 13))


def _operands(op: str, dtype: torch.dtype, layout: str) -> Iterator[Operands]:
    for i, shape in enumerate(SHAPES):
        yield make(Case(op, shape, dtype, layout, ("silu", "identity", "tanh", "sigmoid")[i], "train"))


def _assert_same(got: Results, expected: Results, what: str) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key].to(value.device), value), f"{what}: {key} differs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_change_from_run_to_run(op: str, dtype: torch.dtype, layout: str) -> None:
    for operands in _operands(op, dtype, layout):
        first = run(operands)
        for _ in range(3):
            _assert_same(run(operands), first, str(operands.case))


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "prelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_masked_and_slope_gradients_do_not_change(layout: str, act: str) -> None:
    for op in OPS:
        operands = make(Case(op, (5, 33, 29, 31), torch.bfloat16, layout, act))
        _assert_same(run(operands), run(operands), str(operands.case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_what_else_runs(op: str, layout: str, cuda: torch.device) -> None:
    other, matrix = torch.cuda.Stream(), torch.randn(2048, 2048)
    for operands in _operands(op, torch.bfloat16, layout):
        first = run(operands)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            for _ in range(20):
                torch.mm(matrix, matrix)
        _assert_same(run(operands), first, str(operands.case))
        torch.cuda.synchronize()
