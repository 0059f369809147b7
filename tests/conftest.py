"""What every test starts from: two threads, fixed seeds, the widest kernels; and the instruction-set fixture."""

from collections.abc import Iterator

import pytest
import torch

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.nn import guard

THREADS = 2
SEED = 20150211  # the day "Batch Normalization" was submitted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-tests-on", default="cuda", metavar="DEVICE", help="where tests/gpu run; cpu tries them without a GPU"
    )


def pytest_report_header() -> str:
    if not fr.is_available():
        return f"fused_resnet: stock path: {fr.build_info()['why_unavailable']}"
    return f"fused_resnet: {fr.build_info()['cpu_isa']} kernels; the host runs {', '.join(testing.isa_levels())}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def _fixed_conditions() -> Iterator[None]:
    torch.manual_seed(SEED)
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)
    yield
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def needs_extension() -> None:
    """For tests of what only the compiled extension does."""
    if not fr.is_available():
        pytest.skip(fr.build_info()["why_unavailable"])


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512_bf16", "amx"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, as the cap under which the test runs."""
    request.getfixturevalue("needs_extension")
    level: str = request.param
    if level not in testing.isa_levels():
        pytest.skip(f"this host or build has no {level}")
    with testing.isa_cap(level):
        yield level


@pytest.fixture
def fused_or_double(request: pytest.FixtureRequest) -> None:
    """Skips narrow dtypes on the stock path: it rounds after each operator, these tolerances forgive one rounding."""
    callspec = getattr(request.node, "callspec", None)
    dtype = callspec.params.get("dtype") if callspec is not None else None
    if dtype in (torch.bfloat16, torch.float16) and not fr.is_available():
        pytest.skip("the stock path rounds after every operator")


@pytest.fixture
def plans_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension the operators run on stock PyTorch; what `convert` makes is tested all the same."""
    monkeypatch.setattr(guard, "_UNAVAILABLE", None)
