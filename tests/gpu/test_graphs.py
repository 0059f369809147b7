"""CUDA graphs: a whole training step captured and replayed, and torch.cuda.make_graphed_callables."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

WARMUP, REPLAYS = 3, 4


def _capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


def _model() -> nn.Module:
    """With small residual branches: the gradient of a fresh one is chaotic."""
    model = fr.models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train()
    for block in model.modules():
        if isinstance(block, fr.nn.BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.1)
    return model


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_captured_training_step_replays_the_eager_one(bf16: bool, cuda: torch.device) -> None:
    captured = _model()
    eager = copy.deepcopy(captured)
    batches = [torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last) for _ in range(REPLAYS)]
    target = torch.randint(0, 10, (8,))
    x, twin_x = batches[0].clone(memory_format=torch.preserve_format), batches[0].clone()
    twin_x = twin_x.to(memory_format=torch.channels_last)
    graph, loss = _capture(testing.training_step(captured, list(captured.parameters()), x, target, bf16=bf16))
    step = testing.training_step(eager, list(eager.parameters()), twin_x, target, bf16=bf16)
    for _ in range(WARMUP):
        step()
    tolerance = 1e-2 if bf16 else 1e-4
    for batch in batches:
        x.copy_(batch)
        twin_x.copy_(batch)
        graph.replay()
        expected = step()
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for (name, ours), theirs in zip(captured.named_buffers(), eager.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert int(ours) == int(theirs) == WARMUP + REPLAYS, name
        else:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_replays_give_the_same_bits(cuda: torch.device) -> None:
    model = _model()
    x, target = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last), torch.randint(0, 10, (8,))

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return loss.detach()

    graph, loss = _capture(step)
    results = []
    for _ in range(2):
        graph.replay()
        results.append([loss.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_graphed_callables(bf16: bool, cuda: torch.device) -> None:
    graphed = _model()
    eager = copy.deepcopy(graphed)
    x, target = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last), torch.randint(0, 10, (8,))
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
        call = torch.cuda.make_graphed_callables(graphed, (x,))
        results = []
        for model, function in ((graphed, call), (eager, eager)):
            model.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(function(x), target)
            loss.backward()
            results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)
    difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert difference <= (0.2 if bf16 else 2e-2), f"{float(difference):.3g}"
