"""Whole residual blocks on the CPU: is a block one autograd node, and does it equal the stock one then?"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import testing
from tests.nn.twins import assert_fused_equals_stock, randomise


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.draw(shape, dtype, channels_last=True)


def nodes(y: Tensor) -> Counter[str]:
    """How many nodes of each kind stand behind y."""
    seen, todo = set(), [y.grad_fn]
    found: Counter[str] = Counter()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        found["ResidualBlock" if "ResidualBlock" in name else name.split("::")[-1]] += 1
        todo += [before for before, _ in node.next_functions]
    return found


def assert_whole(block: nn.Module, x: Tensor) -> None:
    found = nodes(copy.deepcopy(block)(x.detach().requires_grad_()))
    assert found.pop("ResidualBlock") == 1
    assert set(found) <= {"AccumulateGrad"}, found


def assert_stages(block: nn.Module, x: Tensor) -> None:
    assert "ResidualBlock" not in nodes(copy.deepcopy(block)(x.detach().requires_grad_()))


def assert_node_equals_stock(block: nn.Module) -> None:
    """In training, over two batches, of which the cumulative average weighs each differently."""
    block = randomise(block).double()
    x = draw(3, 8, 6, 7, dtype=torch.float64)
    assert_whole(block, x)
    for _ in range(2):
        assert_fused_equals_stock(block, x)
        block(x)


def assert_stages_equal_stock(block: nn.Module, *, bias: bool) -> None:
    """`bias`: a convolution has one. In training the batch norm takes it away, and its gradient is zero."""
    block = randomise(block).double()
    x = draw(3, 8, 6, 7, dtype=torch.float64)
    assert_stages(block, x)
    assert_fused_equals_stock(block.eval() if bias else block, x)


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """What a forward pass of `x` keeps for backward, beside the parameters."""
    parameters = {p.data_ptr() for p in block.parameters()}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            sizes.append(t.numel() * t.itemsize)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(sizes)


def assert_compiled_equals_eager(block: Any) -> None:
    compiled = copy.deepcopy(block)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    buffers = [name for name, _ in block.named_buffers()]
    for shape in ((2, 8, 6, 5), (2, 8, 6, 5), (3, 8, 7, 9)):
        x = draw(*shape, dtype=torch.float64)
        got, want = _step(function, compiled, x), _step(block, block, x)
        for key, value in want.items():
            tolerance = 1e-12 if key in buffers else 1e-10
            torch.testing.assert_close(got[key], value, rtol=tolerance, atol=tolerance, msg=key)
            assert got[key].stride() == value.stride(), key
    assert int(block.bn1.num_batches_tracked) == 3 * block.training
    torch._dynamo.reset()


def _step(function: Any, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(leaf)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert leaf.grad is not None
    result = {"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return result | {n: b.clone() for n, b in module.named_buffers()}


def assert_gradients_of_first_and_second_order(block: nn.Module, x: Tensor) -> None:
    """Of a block in float64, against differences."""
    names = [n for n, _ in block.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
        return y

    leaves = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert nodes(call(x, *leaves))["ResidualBlock"] == 1
    assert torch.autograd.gradcheck(call, (x, *leaves), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *leaves), fast_mode=True)
