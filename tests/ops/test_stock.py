"""The stock path computes the same functions, so a machine without the extension gets the same model."""

import pytest
import torch

from fused_resnet import testing
from fused_resnet.ops import _stock
from tests.ops.cases import LAYOUTS, MODES, OPS, Case, check, make, reference, run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_stock_path_against_fp64(op: str, dtype: torch.dtype) -> None:
    for i, act in enumerate(testing.ACTIVATIONS):
        for mode in MODES:
            check(Case(op, (3, 7, 6, 5), dtype, LAYOUTS[i % 2], act, mode), ops=_stock)


@pytest.mark.parametrize("op", OPS)
def test_stock_path_in_narrow_dtypes(op: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for act in ("relu", "identity"):
            operands = make(Case(op, (3, 7, 6, 5), dtype, "NHWC", act))
            got = run(operands, ops=_stock, backward=False)["y"].double()
            expected = reference(operands, backward=False)["y"].value
            difference = float((got - expected).norm() / expected.norm())
            # It rounds after every operator, so by the norm and not by the element.
            assert difference <= 4 * testing.unit_roundoff(dtype), f"{op} {dtype} {act}: {difference:.3g}"
