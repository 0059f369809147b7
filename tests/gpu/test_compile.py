"""torch.compile(fullgraph=True) of a training step on the GPU agrees with eager and keeps the fused operators."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]


def _step(model: nn.Module, call: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(call(x), target)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("backend", "bf16"), [("aot_eager", False), ("inductor", True)], ids=["fp32", "bf16"])
def test_fullgraph_training_step_agrees_with_eager(backend: str, bf16: bool, device: torch.device) -> None:
    if backend == "inductor":
        if device.type != "cuda":
            pytest.skip("inductor on the CPU is a slow test of tests/test_compile.py")
        pytest.importorskip("triton")
    model = fr.models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train()
    for block in model.modules():
        if isinstance(block, fr.nn.BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.1)  # a fresh model's gradient is chaotic
    twin = copy.deepcopy(model)
    x, target = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last), torch.randint(0, 10, (8,))
    torch._dynamo.reset()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        expected, gradient = _step(model, model, x, target)
        loss, compiled_gradient = _step(twin, torch.compile(twin, fullgraph=True, backend=backend), x, target)
    tolerance = 5e-2 if bf16 else 1e-4
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    difference = float((compiled_gradient - gradient).norm() / gradient.norm())
    assert difference <= (0.3 if bf16 else 1e-2), f"{difference:.3g}"
    for (name, ours), theirs in zip(twin.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_graph_holds_the_fused_operators(device: torch.device) -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    model = fr.models.resnet18(num_classes=4).train()
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 3, 32, 32))
    assert any("fused_resnet.batch_norm_act_max_pool" in name for name in seen), seen
    assert not any(name.endswith("batch_norm.default") for name in seen), seen
