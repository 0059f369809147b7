"""Every line of ``kernels.inc`` that this host supports is run and compared with fp64."""

import pytest
import torch

from fused_resnet import _extension, testing
from tests.ops.cases import LAYOUTS, Case, check

ROWS = _extension.extension().kernel_table() if _extension.available() else []
# Which operators, forward and backward, reach a pass.
OPS = {"batch_norm": ("plain", "residual", "dual"), "pool": ("max_pool",)}
PASSES = {
    "batch_norm": {"stats", "apply", "backward_reduce", "backward_apply"},
    "pool": {"forward", "backward_reduce", "backward_apply"},
}


def test_the_table_is_complete_and_names_its_rows() -> None:
    if not ROWS:
        pytest.skip(str(_extension.why_unavailable()))
    assert {op: {row["pass"] for row in ROWS if row["op"] == op} for op in OPS} == PASSES
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["name"].endswith(f"_{row['isa']}"), row
        assert row["supported"] == (row["isa"] in testing.isa_levels()), row
    scalar = {(row["op"], row["pass"], row["dtype"]) for row in ROWS if row["isa"] == "scalar"}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert scalar == {(op, name, dtype) for op, names in PASSES.items() for name in names for dtype in dtypes}


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
            for op in OPS[row["op"]]:
                for i, layout in enumerate(LAYOUTS):
                    check(Case(op, (3, 5, 3, width), dtype, layout, ("relu", "silu")[i]))
                    check(Case(op, (2, width, 3, 5), dtype, layout, ("silu", "leaky_relu")[i]))
    finally:
        extension.set_verbose(False)
    assert row["name"] in capfd.readouterr().err, f"{row['name']} did not say that it ran"
