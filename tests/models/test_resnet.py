"""The ten torchvision constructors: names, weights, errors and numbers are torchvision's and timm's."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.nn.twins import assert_fused_equals_stock, randomise, small
from tests.oracles import timm, torchvision

CONSTRUCTORS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def ours(name: str, **options: Any) -> Any:
    return getattr(fr.models, name)(**options)


def theirs(name: str, **options: Any) -> Any:
    return getattr(torchvision.models, name)(**options)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_children_keys_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        mine, other = ours(name), theirs(name)
    assert repr(mine) == repr(other)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert list(mine.state_dict()) == list(other.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in other.named_modules()]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_timms_keys_are_the_same(name: str) -> None:
    with torch.device("meta"):
        mine, other = ours(name), timm.create_model(f"{name}.tv_in1k" if name == "resnet18" else name)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("options", [{}, {"zero_init_residual": True, "num_classes": 10}], ids=str)
def test_the_same_seed_gives_the_same_weights(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    mine = ours(name, **options).state_dict()
    torch.manual_seed(3)
    other = theirs(name, **options).state_dict()
    assert all(torch.equal(mine[key], value) for key, value in other.items())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_strict_loading_both_ways_gives_torchvisions_logits(name: str, calls: Counter[str]) -> None:
    mine, other = ours(name), randomise(theirs(name))
    mine.load_state_dict(other.state_dict())
    theirs(name).load_state_dict(mine.state_dict())
    x = draw(1, 3, 64, 49)
    with torch.no_grad():
        got, want = mine.eval()(x), other.eval()(x)
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert calls["batch_norm_act_max_pool"] == 1
    ends = calls["residual_block"] + calls["batch_norm_act"] + calls["dual_batch_norm_act"]
    assert ends == (8 if name == "resnet18" else 16)


def test_timms_weights_give_timms_logits(fused: None) -> None:
    mine, other = ours("resnet18", num_classes=10), randomise(timm.create_model("resnet18", num_classes=10))
    mine.load_state_dict(other.state_dict())
    other.load_state_dict(mine.state_dict())
    x = draw(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_equals_stock(channels_last: bool, dtype: torch.dtype, calls: Counter[str]) -> None:
    model = randomise(small()).to(dtype)
    x = draw(3, 3, 71, 65).to(dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    runs = assert_fused_equals_stock(model, x)
    if fr.is_available():
        each = {"conv2d": 1, "batch_norm_act_max_pool": 1, "residual_block": 2}
    else:
        each = {"conv2d": 5, "batch_norm_act_max_pool": 1, "batch_norm_act_conv": 4, "dual_batch_norm_act": 2}
    assert calls == {operator: count * runs for operator, count in each.items()}


def test_steps_of_training_follow_torchvisions(fused: None) -> None:
    torch.manual_seed(1)
    mine = ours("resnet18", num_classes=5).double()
    torch.manual_seed(1)
    other = theirs("resnet18", num_classes=5).double()
    x, target = draw(3, 3, 33, 33).double(), torch.tensor([0, 1, 2])
    for model in (mine, other):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    for (key, mine_value), other_value in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine_value, other_value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    "change",
    ["maxpool identity", "stem 3x3", "stem conv hooked", "frozen", "norm_layer"],
)
def test_changed_stems(change: str, calls: Counter[str]) -> None:
    model = randomise(small(norm_layer=(lambda c: nn.GroupNorm(2, c)) if change == "norm_layer" else None))
    fired = []
    if change == "maxpool identity":
        model.maxpool = nn.Identity()
    elif change == "stem 3x3":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif change == "stem conv hooked":
        model.conv1.register_forward_hook(lambda *_: fired.append(1))
    elif change == "frozen":
        model.bn1.eval()
    assert_fused_equals_stock(model.double(), draw(2, 3, 33, 33).double())
    assert calls["batch_norm_act_max_pool"] == (change in ("stem 3x3", "stem conv hooked", "frozen"))
    assert calls["batch_norm_act"] == (change == "maxpool identity")
    assert bool(fired) == (change == "stem conv hooked")


@pytest.mark.parametrize(
    "options",
    [
        {"replace_stride_with_dilation": [True, True]},
        {"replace_stride_with_dilation": [True, False, False]},
        {"groups": 2},
        {"width_per_group": 128},
        {"zero_init": True},
    ],
    ids=str,
)
def test_errors_are_torchvisions(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, NotImplementedError, TypeError)) as other:
        theirs("resnet18", **options)
    with pytest.raises(other.type) as mine:
        ours("resnet18", **options)
    assert str(mine.value) == str(other.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnext50_32x4d", {"groups": 8}), ("wide_resnet50_2", {"width_per_group": 64})],
)
def test_fixed_arguments_may_not_be_overridden(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected value") as other:
        theirs(name, **options)
    with pytest.raises(ValueError, match="expected value") as mine:
        ours(name, **options)
    assert str(mine.value) == str(other.value)


def test_dilation_instead_of_stride(fused: None) -> None:
    options = {"replace_stride_with_dilation": [False, True, True]}
    mine, other = ours("resnet50", **options), theirs("resnet50", **options)
    other.load_state_dict(mine.state_dict())
    x = draw(1, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


def test_weights_of_another_model_are_refused() -> None:
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    with pytest.raises(TypeError) as other:
        theirs("resnet50", weights=entry)
    with pytest.raises(TypeError) as mine:
        ours("resnet50", weights=entry)
    assert str(mine.value) == str(other.value)


def test_weights_fix_the_number_of_classes() -> None:
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    with pytest.raises(ValueError, match="num_classes"):
        ours("resnet18", weights=entry, num_classes=10)


def test_weights_from_a_state_dict_and_a_file(tmp_path: Any) -> None:
    model = randomise(ours("resnet18", num_classes=3))
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    for weights in (model.state_dict(), path, str(path)):
        loaded = ours("resnet18", weights=weights, num_classes=3)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_subclass_may_override_forward_impl(calls: Counter[str]) -> None:
    class Backbone(fr.models.ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    assert Backbone(fr.nn.BasicBlock, [1, 1, 1, 1])(draw(1, 3, 32, 32)).shape == (1, 64, 8, 8)
    assert calls["batch_norm_act_max_pool"] == 0
    assert calls["batch_norm_act_conv"] == 1


def test_deepcopy_is_independent(fused: None) -> None:
    model = small()
    twin = copy.deepcopy(model)
    twin(draw(2, 3, 32, 32))
    assert model.bn1.num_batches_tracked == 0
    assert twin.bn1.num_batches_tracked == 1
