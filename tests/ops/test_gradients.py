"""Forward, statistics and every gradient of the batch-norm family against fp64, over dtype, layout, act and mode."""

import pytest
import torch

from fused_resnet import testing
from tests.ops.cases import DTYPES, LAYOUTS, MODES, OPS, Case, check, grid

pytestmark = pytest.mark.usefixtures("fused_or_double")

# Tails of every vector width and odd channel counts; the grid walks through them in turn.
SHAPES = (
    (2, 3, 7, 5),
    (4, 13, 1, 1),
    (3, 65, 5, 3),
    (1, 16, 8, 8),
    (5, 1, 7, 5),
    (1, 34, 9, 17),
    (2, 24, 4, 16),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_activation_mode_and_layout(op: str, dtype: torch.dtype) -> None:
    combinations = grid(
        op=(op,), shape=((0, 0, 0, 0),), dtype=(dtype,), act=testing.ACTIVATIONS, mode=MODES, layout=LAYOUTS
    )
    for i, case in enumerate(combinations):
        for shape in (SHAPES[i % len(SHAPES)], SHAPES[(i + 3) % len(SHAPES)]):
            check(Case(case.op, shape, case.dtype, case.layout, case.act, case.mode, narrow_parameters=i % 3 == 0))
