"""Pre-activation ResNets: sizes, timm's resnetv2 as oracle, and the fused path against the stock one."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.nn.twins import assert_fused_equals_stock, randomise
from tests.oracles import timm

IMAGENET = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
CIFAR = {110: 18, 164: 18, 1001: 111}
TIMMS = (("fc", "head.fc"), ("conv1", "stem.conv"), ("bn", "norm"))


def timms_key(key: str) -> str:
    """`layer2.0.bn1.weight` is `stages.1.blocks.0.norm1.weight` there."""
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", key)
    if match:
        stage, block, rest = match.groups()
        rest = rest.replace("downsample.", "downsample.conv.").replace("bn", "norm")
        return f"stages.{int(stage) - 1}.blocks.{block}.{rest}"
    name, _, rest = key.partition(".")
    return f"{dict(TIMMS)[name]}.{rest}"


def timms(depth: int, state: dict[str, Any], **options: Any) -> nn.Module:
    model = timm.create_model(f"resnetv2_{depth}", **options)
    renamed = {timms_key(key): value for key, value in state.items()}
    if "head.fc.weight" not in model.state_dict():  # a 1x1 convolution there
        renamed["head.fc.weight"] = renamed["head.fc.weight"][:, :, None, None]
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.reshape(shapes.get(key, value.shape)) for key, value in renamed.items()})
    return model


@pytest.mark.parametrize("depth", IMAGENET)
def test_layers_of_imagenet_models(depth: int) -> None:
    with torch.device("meta"):
        model = getattr(fr.models.preact, f"preresnet{depth}")()
    blocks = [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)]
    assert tuple(blocks) == IMAGENET[depth]
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in model.modules())
    pointwise = sum(name.endswith(("conv1", "conv3")) for name, _ in model.named_modules()) - 1
    assert convolutions + (pointwise if depth >= 50 else 0) + 1 == depth
    assert [n for n, _ in model.named_children()][-4:] == ["bn", "relu", "avgpool", "fc"]


@pytest.mark.parametrize("depth", CIFAR)
def test_layers_of_cifar_models(depth: int) -> None:
    with torch.device("meta"):
        model = getattr(fr.models.preact, f"cifar_preresnet{depth}")()
    assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3)] == [CIFAR[depth]] * 3
    per_block = 2 if depth == 110 else 3
    assert 3 * CIFAR[depth] * per_block + 2 == depth
    assert model.fc.in_features == (64 if depth == 110 else 256)
    # He et al. 2016, table 4, gives 1.7 and 10.2 million for 164 and 1001 layers.
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx({110: 1.7, 164: 1.7, 1001: 10.2}[depth], abs=0.15)


@pytest.mark.parametrize("depth", [18, 50])
def test_timms_resnetv2_is_the_same_network(depth: int, calls: Counter[str]) -> None:
    model = randomise(getattr(fr.models.preact, f"preresnet{depth}")(num_classes=10)).eval()
    other = timms(depth, model.state_dict(), num_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-3)
    assert calls["batch_norm_act_conv"] > 0


@pytest.mark.parametrize("block", ["PreActBasicBlock", "PreActBottleneck"])
def test_a_training_step_equals_stock(block: str, calls: Counter[str]) -> None:
    model = randomise(fr.models.preact.PreActResNet(getattr(fr.nn, block), [1, 2, 1, 1], num_classes=5)).double()
    assert_fused_equals_stock(model, torch.randn(3, 3, 49, 49, dtype=torch.float64))
    assert calls["batch_norm_act"] == (4 if block == "PreActBasicBlock" else 5)


def test_a_cifar_training_step_equals_stock(calls: Counter[str]) -> None:
    model = randomise(fr.models.preact.CifarPreActResNet(fr.nn.PreActBottleneck, 2)).double()
    assert_fused_equals_stock(model, torch.randn(2, 3, 17, 17, dtype=torch.float64))
    assert calls["batch_norm_act"] == 4


def test_the_head_is_guarded(calls: Counter[str]) -> None:
    model = fr.models.preact.CifarPreActResNet(fr.nn.PreActBasicBlock, 1)
    seen = []
    model.bn.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(2, 3, 8, 8))
    assert seen == [1]
    assert calls["batch_norm_act"] == 2


def test_weights(tmp_path: Any) -> None:
    model = randomise(fr.models.preact.preresnet18(num_classes=3))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = fr.models.preact.preresnet18(weights=tmp_path / "weights.pt", num_classes=3)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "layers"), [("PreActResNet", [1, 1, 1]), ("CifarPreActResNet", 0)])
def test_impossible_depths(kind: str, layers: Any) -> None:
    with pytest.raises(ValueError, match=kind):
        getattr(fr.models.preact, kind)(fr.nn.PreActBasicBlock, layers)
