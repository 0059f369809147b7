"""Where the GPU's tests run, and that their convolutions are exact and the same at every call."""

from collections.abc import Iterator

import pytest
import torch

import fused_resnet as fr


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The first GPU, or what --gpu-tests-on says."""
    name: str = request.config.getoption("--gpu-tests-on")
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
    info = fr.build_info()
    if info.get("cuda_usable") is not True:
        pytest.fail(f"fused_resnet has no kernels for this GPU: build_info() is {info}", pytrace=False)
    return torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """For tests of streams, graphs and memory: the device, which must be a GPU."""
    if device.type != "cuda":
        pytest.skip(f"about CUDA itself, not about {device.type}")
    return device


@pytest.fixture
def on_device(device: torch.device) -> Iterator[torch.device]:
    """Makes it torch's default device, so that tests written for the CPU draw their operands there."""
    with torch.device(device):
        yield device


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
