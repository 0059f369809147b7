"""ImageNet networks without shortcuts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.models import plain
from fused_resnet.models.plain import PlainBlock


def reference(block: PlainBlock, x: Tensor) -> Tensor:
    out = torch.relu(block.bn1(block.conv1(x)))
    return torch.relu(block.bn2(block.conv2(out)))


@pytest.mark.parametrize(("name", "depth"), [("plain18", 18), ("plain34", 34)])
def test_depth_and_children(name: str, depth: int) -> None:
    with torch.device("meta"):
        model = getattr(plain, name)()
    assert len([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]) == depth
    assert not any("downsample" in path for path, _ in model.named_modules())
    assert [path for path, _ in model.named_children()] == [path for path, _ in fr.models.resnet18().named_children()]


def test_keys_are_those_of_the_residual_network_less_its_projections() -> None:
    with torch.device("meta"):
        ours, residual = plain.plain18().state_dict(), fr.models.resnet18().state_dict()
    assert list(ours) == [key for key in residual if "downsample" not in key]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_block(stride: int, training: bool, channels_last: bool) -> None:
    block = PlainBlock(6, 8, stride).double().train(training)
    for bn in (block.bn1, block.bn2):
        nn.init.uniform_(bn.bias, -1, 1)
    twin = copy.deepcopy(block)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    results = []
    for module, forward in ((block, block), (twin, lambda x: reference(twin, x))):
        y = forward(x)
        results.append((y, torch.autograd.grad(y.square().sum(), [x, *module.parameters()]), list(module.buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("needs_extension")
def test_every_unit_is_fused() -> None:
    table = fr.nn.explain(plain.plain18(), torch.randn(1, 3, 32, 32))
    assert table.fused == len(table) == 9, str(table)


@pytest.mark.usefixtures("needs_extension")
def test_block_does_not_keep_its_inner_activation() -> None:
    block, x = PlainBlock(4, 4), torch.randn(2, 4, 8, 8)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape:
            kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    assert len(set(kept)) == 3  # x and the outputs of both convolutions


def test_whole_network_runs_and_other_norms_too() -> None:
    model = plain.plain18(num_classes=5, norm_layer=lambda planes: nn.GroupNorm(8, planes))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert plain.plain34(num_classes=5)(torch.randn(2, 3, 32, 32)).shape == (2, 5)
