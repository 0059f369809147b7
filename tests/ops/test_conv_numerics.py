"""What `fused_resnet.numerics` and PyTorch's matmul precision allow is read at every call, and named by the plan."""

from collections.abc import Iterator

import pytest
import torch

import fused_resnet as fr
from fused_resnet import _extension, testing

pytestmark = pytest.mark.usefixtures("needs_extension")

PRODUCTS = {
    "highest": ", six products for one",
    "high": ", three products for one",
    "medium": ", three products for one",
}


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_split_bfloat16_holds_within_its_context() -> None:
    assert fr.numerics.split_bfloat16_allowed() is None
    with fr.numerics.split_bfloat16(False):
        assert fr.numerics.split_bfloat16_allowed() is False
        with fr.numerics.split_bfloat16(True):
            assert fr.numerics.split_bfloat16_allowed() is True
        assert fr.numerics.split_bfloat16_allowed() is False
    assert fr.numerics.split_bfloat16_allowed() is None


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("precision", PRODUCTS)
def test_what_the_kernels_are_told(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    parts = 3 if precision == "highest" else 2
    numerics = _extension.extension().conv_numerics
    assert numerics() == (True, parts, True)
    with fr.numerics.winograd(False):
        assert numerics() == (False, parts, True)
    with fr.numerics.split_bfloat16(True):
        assert numerics() == (True, parts, False)
    with fr.numerics.split_bfloat16(False):
        assert numerics() == (True, 0, False)


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize(("asked", "parts"), [("ieee", 3), ("tf32", 2), ("bf16", 2)])
def test_what_is_asked_of_convolutions_comes_first(asked: str, parts: int) -> None:
    torch.set_float32_matmul_precision("highest" if parts == 2 else "high")
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = asked
    try:
        assert _extension.extension().conv_numerics() == (True, parts, True)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("allowed", [None, True, False])
@pytest.mark.parametrize("precision", PRODUCTS)
@pytest.mark.parametrize("channels", [32, 160])  # the fewer do not pay for it
def test_the_plan_says_how_floats_are_multiplied(
    isa: str, channels: int, precision: str, allowed: bool | None, capfd: pytest.CaptureFixture[str]
) -> None:
    # Extents that no other test uses: the verbose mode speaks once for each plan.
    height = 25 + list(PRODUCTS).index(precision) + 3 * [None, True, False].index(allowed)
    width = 41 + testing.isa_levels().index(isa)
    x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.set_float32_matmul_precision(precision)
    _extension.extension().set_verbose(True)
    try:
        with fr.numerics.split_bfloat16(allowed):
            y = fr.ops.conv2d(x, weight)
    finally:
        _extension.extension().set_verbose(False)
    said = capfd.readouterr().err
    split = isa == "amx" and (channels > 32 if allowed is None else allowed)
    assert ("conv_f32_amx" in said) == split, said
    assert [text for text in set(PRODUCTS.values()) if text in said] == [PRODUCTS[precision]] * split
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    limit = 6e-6 if split and precision != "highest" else 1e-6  # docs/numerics.md
    assert (y.double() - exact).norm() / exact.norm() < limit
