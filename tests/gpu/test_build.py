"""The build has kernels for this GPU, and a model on it runs fused."""

import pytest
import torch

import fused_resnet as fr
from fused_resnet import testing

pytestmark = pytest.mark.gpu


def test_build_info_says_that_the_gpu_is_usable(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
    info = fr.build_info()
    assert info["available"] is True, info["why_unavailable"]
    assert info["cuda_archs"], info
    assert info["cuda_usable"] is True, info


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_model_runs_fused(training: bool, device: torch.device) -> None:
    model = fr.models.resnet50(num_classes=5).to(device, memory_format=torch.channels_last).train(training)
    x = torch.randn(2, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    for narrow in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            calls = testing.count_batch_norms(lambda: model(x))
        assert calls.stock == 0
        # On a GPU each of the four downsample branches shares its operator with a block's end.
        assert calls.fused == (53 - 4 if device.type == "cuda" else 53)
    table = fr.nn.explain(model)
    assert table.fused == len(table), str(table)
