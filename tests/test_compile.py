"""A training step of resnet18 under torch.compile(fullgraph=True) agrees with eager."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr


def _step(model: nn.Module, call: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = nn.functional.cross_entropy(call(x), target)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _check(backend: str, dtype: torch.dtype | None = None) -> None:
    torch.manual_seed(0)
    model = fr.models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train()
    for block in model.modules():  # small residual branches: a fresh network's gradients are chaotic
        if isinstance(block, fr.nn.BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.2)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (4,))
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        expected, gradients = _step(model, model, x, target)
        loss, compiled_gradients = _step(twin, compiled, x, target)
    # One graph or another, the operators are the same; what differs is what a compiler fuses, and so rounds less.
    tolerance, gradient_tolerance = (1e-4, 1e-3) if dtype is None else (1e-2, 5e-2)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (compiled_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert difference <= gradient_tolerance, f"{name}: {difference:.3g}"
    for (name, ours), theirs in zip(twin.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])


@DTYPES
def test_fullgraph_training_step_agrees_with_eager(dtype: torch.dtype | None) -> None:
    _check("aot_eager", dtype)


@pytest.mark.slow
@DTYPES
def test_fullgraph_training_step_through_inductor_agrees_with_eager(dtype: torch.dtype | None) -> None:
    _check("inductor", dtype)


@pytest.mark.usefixtures("needs_extension")
def test_graph_holds_the_fused_operators() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    model = fr.models.resnet18(num_classes=4).train()
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 3, 64, 64))
    assert any("fused_resnet.batch_norm_act_max_pool" in name for name in seen), seen
    assert sum("fused_resnet.residual_block" in name for name in seen) == 8, seen
    assert not any(name.endswith("batch_norm.default") for name in seen)
