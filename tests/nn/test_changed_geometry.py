"""What a convolution was made with may be changed to whatever ATen takes, as people do who want larger features."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fused_resnet as fr

CHANGES: dict[str, Callable[[nn.Conv2d], None]] = {
    "stride": lambda conv: setattr(conv, "stride", 1),
    "stride as a list": lambda conv: setattr(conv, "stride", [1, 1]),
    "stride of one": lambda conv: setattr(conv, "stride", [1]),
    "padding and dilation": lambda conv: (setattr(conv, "padding", 2), setattr(conv, "dilation", 2))[0],
    "kernel_size, which nobody reads": lambda conv: setattr(conv, "kernel_size", 3),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("change", CHANGES)
def test_change(change: str, layout: torch.memory_format, fused: None) -> None:
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    block = fr.nn.Bottleneck(8, 4, stride=2, downsample=shortcut).double()
    CHANGES[change](block.conv2)
    shortcut[0].stride = block.conv2.stride
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64).to(memory_format=layout)
    y = block(x)
    with fr.nn.stock():
        assert torch.allclose(y, block(x), rtol=1e-10, atol=1e-10)


def test_set_memory_leaves_other_modules_alone() -> None:
    class Other(nn.Module):
        memory = None

    model = nn.Sequential(fr.nn.BasicBlock(4, 4), Other())
    fr.nn.set_memory(model, "recompute")
    assert model[0].memory == "recompute"
    assert model[1].memory is None


def test_groups_compile_for_any_extent(fused: None) -> None:
    block = fr.nn.Bottleneck(64, 16, groups=4, base_width=256).eval()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for extent in (17, 15, 9):
        x = torch.randn(2, 64, extent, extent).to(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x))
