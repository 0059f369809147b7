"""`set_memory`: what a bottleneck keeps for backward, and that its results do not depend on it."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.nn.twins import randomise

pytestmark = pytest.mark.usefixtures("needs_extension")


def bottleneck(stride: int = 1) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride, bias=False), nn.BatchNorm2d(32))
    return randomise(fr.nn.Bottleneck(16, 8, stride, shortcut)).to(memory_format=torch.channels_last)


def step(block: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Output, gradients and statistics of one step, and how many elements autograd kept."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = block(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    grads = [p.grad for p in block.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in block.buffers())], sum(t.numel() for t in kept)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_recomputed_results_are_the_same_bits_from_less_memory(stride: int, dtype: torch.dtype, training: bool) -> None:
    keeping = bottleneck(stride).to(dtype).train(training)
    recomputing = copy.deepcopy(keeping)
    fr.nn.set_memory(recomputing, "recompute")
    x = torch.randn(3, 16, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    want, kept = step(keeping, x)
    got, less = step(recomputing, x)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert kept - less == want[0].numel()


def test_blocks_without_a_last_1x1_keep_everything() -> None:
    block = randomise(fr.nn.BasicBlock(8, 8)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    _, kept = step(copy.deepcopy(block), x)
    fr.nn.set_memory(block, "recompute")
    assert step(block, x)[1] == kept


def test_modes_are_named() -> None:
    with pytest.raises(ValueError, match="expected memory 'keep' or 'recompute', got 'less'"):
        fr.nn.set_memory(bottleneck(), "less")


def test_winograd_can_be_refused() -> None:
    block = randomise(fr.nn.BasicBlock(32, 32)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 28, 28, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(block).double()(x.double())
    errors = {}
    for allowed in (True, False):
        with fr.numerics.winograd(allowed):
            assert fr.numerics.winograd_allowed() is allowed
            errors[allowed] = ((copy.deepcopy(block)(x) - exact).norm() / exact.norm()).item()
    assert fr.numerics.winograd_allowed()
    assert 0 < errors[False] < errors[True] < 5e-6  # docs/numerics.md: about three times apart
