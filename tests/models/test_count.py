"""Parameters and multiply-adds against the tables of torchvision and of He et al. 2015."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.models import cifar, count, plain

# 224x224; v1.5: the stride sits in the 3x3.
IMAGENET = {
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "resnext101_32x8d": (88_791_336, 16_414_015_488),
    "resnext101_64x4d": (83_455_272, 15_460_270_080),
    "wide_resnet50_2": (68_883_240, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 22_753_050_624),
}
CIFAR = {
    20: (269_722, 40_551_040),
    32: (464_154, 68_862_592),
    44: (658_586, 97_174_144),
    56: (853_018, 125_485_696),
    110: (1_727_962, 252_887_680),
    1202: (19_421_274, 2_829_238_912),
}
OPTION_B_PARAMS = 2_752


@pytest.fixture(autouse=True)
def on_meta() -> Any:
    """Counting needs no numbers, so these models get no memory."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", IMAGENET)
def test_torchvision_table(name: str) -> None:
    assert count(getattr(fr.models, name)(), (3, 224, 224)) == IMAGENET[name]


def test_v1_is_counted_where_the_stride_is_moved() -> None:
    model = fr.models.resnet50()
    for module in model.modules():
        if isinstance(module, fr.nn.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    assert count(model, (3, 224, 224)).macs == 3_857_973_248


@pytest.mark.parametrize("depth", CIFAR)
def test_cifar_table(depth: int) -> None:
    assert count(getattr(cifar, f"resnet{depth}")(), (3, 32, 32)) == CIFAR[depth]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_option_b_and_plain(depth: int) -> None:
    params, macs = CIFAR[depth]
    projections = 16 * 16 * 16 * 32 + 8 * 8 * 32 * 64
    assert count(getattr(cifar, f"resnet{depth}")(shortcut="B"), 32) == (params + OPTION_B_PARAMS, macs + projections)
    assert count(getattr(cifar, f"plain{depth}")(), 32) == (params, macs)


def test_imagenet_plain_has_the_parameters_of_option_a() -> None:
    assert count(plain.plain18(), 224).params == 11_515_688
    assert count(plain.plain34(), 224).params == 21_623_848


def test_groups_bias_linear_and_one_dimensional_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=True), nn.Flatten(2), nn.Conv1d(6, 5, 1), nn.Linear(4, 3))
    assert count(model, (4, 4, 4)) == (6 * 2 * 9 + 6 + 6 * 5 + 5 + 4 * 3 + 3, 4 * 6 * 2 * 9 + 4 * 6 * 5 + 5 * 4 * 3)


@pytest.mark.parametrize("size", [32, (32, 32), (3, 32, 32), (1, 3, 32, 32)])
def test_input_sizes(size: Any) -> None:
    assert count(cifar.resnet20(), size) == CIFAR[20]


def test_batch_counts_every_image() -> None:
    assert count(cifar.resnet20(), (5, 3, 32, 32)) == (CIFAR[20][0], 5 * CIFAR[20][1])


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    assert count(nn.Sequential(layer, layer), (1, 3, 3)) == (12, 2 * 3 * 9)


@pytest.mark.parametrize("size", [(32,), (3, 0, 32), (3, 32.0, 32), (1, 1, 3, 32, 32)])
def test_refuses_input_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="expected input_size H"):
        count(cifar.resnet20(), size)


def test_model_is_not_touched() -> None:
    with torch.device("cpu"):
        model = fr.convert(cifar.resnet20()).train()
    calls: list[str] = []
    model.conv1.register_forward_hook(lambda *_: calls.append("ran"))
    before = copy.deepcopy(model.state_dict())
    assert count(model, 32) == CIFAR[20]
    assert model.training
    assert not calls
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert next(model.parameters()).device.type == "cpu"
