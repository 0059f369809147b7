"""Pre-activation blocks: the order of the layers, and the fused path against the stock one."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.nn import guard
from tests.nn.twins import assert_fused_equals_stock, randomise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ("PreActBasicBlock", "PreActBottleneck")


def make(name: str, inplanes: int = 8, stride: int = 1) -> nn.Module:
    block = getattr(fr.nn, name)
    downsample = nn.Conv2d(inplanes, 8, 1, stride, bias=False) if stride != 1 or inplanes != 8 else None
    return randomise(block(inplanes, 8 // block.expansion, stride, downsample))


def convs(name: str) -> int:
    return 2 if name == "PreActBasicBlock" else 3


@pytest.mark.parametrize("name", BLOCKS)
def test_children(name: str) -> None:
    pairs = [f"{kind}{i + 1}" for i in range(convs(name)) for kind in ("bn", "conv")]
    assert [n for n, _ in make(name, stride=2).named_children()] == [*pairs, "relu", "downsample"]
    assert [n for n, _ in make(name).named_children()] == [*pairs, "relu"]


def test_formula_of_the_basic_block(fused: None) -> None:
    block = make("PreActBasicBlock", inplanes=5, stride=2).double()
    x = testing.draw((2, 5, 7, 7), torch.float64)

    def normalise(x: Tensor, bn: nn.Module) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / torch.sqrt(var + bn.eps)
        return (x * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)).clamp(min=0)

    a = normalise(x, block.bn1)
    z = nn.functional.conv2d(a, block.conv1.weight, stride=2, padding=1)
    z = nn.functional.conv2d(normalise(z, block.bn2), block.conv2.weight, padding=1)
    want = z + nn.functional.conv2d(a, block.downsample.weight, stride=2)
    torch.testing.assert_close(block(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_training_equals_stock(
    name: str, stride: int, channels_last: bool, dtype: torch.dtype, calls: Counter[str]
) -> None:
    block = make(name, inplanes=8 if stride == 1 else 4, stride=stride).to(dtype)
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    x = testing.draw((2, 8 if stride == 1 else 4, 7, 5), dtype, channels_last=channels_last)
    runs = assert_fused_equals_stock(block, x)
    if channels_last and fr.is_available():
        assert calls == {"residual_block": runs}
    elif stride == 1:
        assert calls == {"batch_norm_act_conv": convs(name) * runs}
    else:
        each = {"batch_norm_act": 1, "conv2d": 2, "batch_norm_act_conv": convs(name) - 1}
        assert calls == {operator: count * runs for operator, count in each.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_evaluation_equals_stock(name: str, calls: Counter[str]) -> None:
    assert_fused_equals_stock(make(name).eval(), testing.draw((2, 8, 6, 5), torch.float32))
    assert calls == {"batch_norm_act_conv": convs(name)}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("last", ["conv", "bn"])
def test_every_child_is_guarded(name: str, last: str, calls: Counter[str]) -> None:
    block = make(name)
    child = f"{last}{convs(name)}"
    block.get_submodule(child).register_forward_hook(lambda *_: None)
    assert guard.why_stock(block) == f"{child} has a forward hook"
    block(testing.draw((2, 8, 6, 5), torch.float32))
    assert not calls


def test_a_shortcut_that_is_no_plain_convolution_is_called(calls: Counter[str]) -> None:
    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1))
    block = randomise(fr.nn.PreActBasicBlock(4, 8, 2, shortcut))
    assert_fused_equals_stock(block, testing.draw((2, 4, 6, 6), torch.float32))
    assert calls == {"batch_norm_act": 1, "conv2d": 1, "batch_norm_act_conv": 1}
