"""`convert` changes no number, keeps names and keys, fuses what it can and says what it left and why."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests import convert_models as own
from tests.oracles import timm, torchvision

TvResNet, TvBasic, TvBottleneck = (
    getattr(torchvision.models.resnet, n) for n in ("ResNet", "BasicBlock", "Bottleneck")
)
TimmResNet, TimmBasic, TimmBottleneck = (getattr(timm.models.resnet, n) for n in ("ResNet", "BasicBlock", "Bottleneck"))
BlurPool2d = timm.layers.BlurPool2d

pytestmark = pytest.mark.usefixtures("plans_run")

LAYERS = [2, 1, 1, 1]
tv = partial(TvResNet, layers=LAYERS, num_classes=3)
ti = partial(TimmResNet, layers=LAYERS, num_classes=3, zero_init_last=False)

# name: (constructor, units fused: blocks, downsamples, stems)
VARIANTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision basic": (partial(tv, TvBasic), 9),
    "torchvision bottleneck": (partial(tv, TvBottleneck), 10),
    "torchvision grouped": (partial(tv, TvBottleneck, groups=4, width_per_group=16), 10),
    "torchvision dilated": (partial(tv, TvBottleneck, replace_stride_with_dilation=[False, True, True]), 10),
    "timm basic": (partial(ti, TimmBasic), 9),
    "timm bottleneck": (partial(ti, TimmBottleneck), 10),
    "timm d": (partial(ti, TimmBottleneck, stem_type="deep", stem_width=32, avg_down=True), 11),
    "timm d dilated": (partial(ti, TimmBottleneck, stem_type="deep", avg_down=True, output_stride=8), 11),
    "timm conv stem pool": (partial(ti, TimmBasic, replace_stem_pool=True), 10),
    "timm se": (partial(ti, TimmBottleneck, block_args={"attn_layer": "se"}), 10),
    "timm eca": (partial(ti, TimmBasic, block_args={"attn_layer": "eca"}), 9),
    "timm blur": (partial(ti, TimmBottleneck, aa_layer=BlurPool2d), 10),
    "timm average": (partial(ti, TimmBasic, aa_layer=nn.AvgPool2d), 9),
    "timm drop path": (partial(ti, TimmBottleneck, drop_path_rate=0.3), 10),
    "timm drop block": (partial(ti, TimmBasic, drop_block_rate=0.1, drop_rate=0.2), 9),
    "timm silu": (partial(ti, TimmBasic, act_layer="silu"), 9),
    "timm leaky relu": (partial(ti, TimmBasic, act_layer="leaky_relu"), 9),
    "timm prelu": (partial(ti, TimmBasic, act_layer="prelu"), 9),
    "timm relu6": (partial(ti, TimmBasic, act_layer="relu6"), 9),
    "timm group norm": (partial(ti, TimmBasic, norm_layer="groupnorm"), 0),
}


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(model: nn.Module, x: Tensor, training: bool) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Outputs, gradients (of the input first) and buffers after one pass in fp64."""
    model.train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(2)  # dropout
    y = model(x * 1)
    out = y if isinstance(y, tuple) else (y,)
    loss = sum((part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in out)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
    return y, [g for g in gradients if g is not None], [b.clone() for b in model.buffers()]


def assert_equal_runs(converted: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """fp64 rounding is all that may differ; four passes, so that running statistics are seen to be used."""
    for training in (True, False, True, False):
        torch.testing.assert_close(run(converted, x, training), run(stock, x, training), rtol=1e-7, atol=1e-9)


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = make().double()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return fr.convert(stock), stock


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    make, units = VARIANTS[name]
    converted, stock = both(make)
    assert list(converted.state_dict()) == list(stock.state_dict())
    assert [path for path, _ in converted.named_modules()] == [path for path, _ in stock.named_modules()]
    assert isinstance(converted, type(stock))
    table = fr.nn.explain(converted)
    assert table.fused == units, str(table)
    assert_equal_runs(converted, stock, images())


def test_fuses_every_batch_norm_of_the_families() -> None:
    for name in ("torchvision bottleneck", "timm d", "timm se", "timm blur", "timm drop path"):
        converted, _ = both(VARIANTS[name][0])
        table = fr.nn.explain(converted)
        assert table.fused == len(table), str(table)
        assert not any(row.why for row in table), str(table)


def test_group_norm_stays_untouched_and_is_reported() -> None:
    converted, stock = both(VARIANTS["timm group norm"][0])
    assert [type(m) for m in converted.modules()] == [type(m) for m in stock.modules()]
    left = {row.path: row.why for row in fr.nn.explain(converted)}
    assert set(left) == {path for path, m in stock.named_modules() if isinstance(m, nn.GroupNorm)}
    assert all("GroupNorm" in why for why in left.values())


@pytest.mark.parametrize("cls", own.FUSIBLE)
def test_own_module(cls: type[own.Base]) -> None:
    converted, stock = both(cls)
    table = fr.nn.explain(converted)
    assert table[0].fused, str(table)
    assert_equal_runs(converted, stock, images(4, 6))


@pytest.mark.parametrize("cls", own.UNSAFE)
def test_unsafe_forward_stays_stock(cls: type[own.Base]) -> None:
    converted, stock = both(cls)
    assert type(converted) is cls
    table = fr.nn.explain(converted)
    assert table.fused == 0
    assert own.UNSAFE[cls] in {row.path: row.why for row in table}["bn1"]
    assert_equal_runs(converted, stock, images(4, 6))


@pytest.mark.parametrize("cls", own.HAZARDS)
def test_hazard_changes_no_number(cls: type[own.Base]) -> None:
    assert_equal_runs(*both(cls), images(4, 6))


@pytest.mark.parametrize("cls", own.HAZARDS + own.HAZARDS_WITHOUT_GRADIENT)
def test_hazard_changes_nothing_that_the_caller_sees(cls: type[own.Base]) -> None:
    converted, stock = both(cls)
    inputs = images(4, 6), images(4, 6)
    with torch.no_grad():
        outputs = converted.train()(inputs[0]), stock.train()(inputs[1])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*inputs)
    torch.testing.assert_close(dict(converted.named_buffers()), dict(stock.named_buffers()))


@pytest.mark.parametrize(
    "act", [nn.LeakyReLU(0.2), nn.PReLU(4), nn.PReLU(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Identity()]
)
def test_activation(act: nn.Module) -> None:
    converted, stock = both(lambda: own.Activated(act))
    assert fr.nn.explain(converted).fused == 1
    assert_equal_runs(converted, stock, images(4, 6))


def sequential() -> nn.Sequential:
    return nn.Sequential(
        own.conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), own.conv(4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
    )


def test_sequential() -> None:
    converted, stock = both(sequential)
    assert fr.nn.explain(converted).fused == 1
    assert isinstance(converted, nn.Sequential)
    assert_equal_runs(converted, stock, images(4, 6))


def test_sequential_changed_after_conversion() -> None:
    converted, stock = both(sequential)
    assert isinstance(converted, nn.Sequential)
    assert isinstance(stock, nn.Sequential)
    assert_equal_runs(converted[:3], stock[:3], images(4, 6))
    for model in (converted, stock):
        model[2] = nn.Tanh()
    assert_equal_runs(converted, stock, images(4, 6))
    for model in (converted, stock):
        model.append(nn.Sigmoid())
    assert_equal_runs(converted, stock, images(4, 6))
    assert "other children" in fr.nn.explain(converted)[0].why or "replaced" in fr.nn.explain(converted)[0].why


def test_copy_leaves_the_model_alone() -> None:
    converted, stock = both(partial(tv, TvBasic))
    assert converted is not stock
    assert not any(type(m).__module__.startswith("fused_resnet") for m in stock.modules())
    ours, theirs = {p.data_ptr() for p in converted.parameters()}, {p.data_ptr() for p in stock.parameters()}
    assert not ours & theirs


def test_inplace_returns_the_model() -> None:
    model = tv(TvBasic)
    assert fr.convert(model, inplace=True) is model
    assert fr.nn.explain(model).fused == 9


def test_twice_is_once() -> None:
    converted, stock = both(partial(tv, TvBasic))
    again = fr.convert(converted)
    assert fr.nn.explain(again) == fr.nn.explain(converted)
    assert_equal_runs(again, stock, images())


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("passage", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file, copy.copy])
def test_copies_stay_fused(passage: Callable[[nn.Module], nn.Module]) -> None:
    converted, stock = both(VARIANTS["timm d"][0])
    twin = passage(converted)
    assert fr.nn.explain(twin) == fr.nn.explain(converted)
    assert_equal_runs(twin, stock, images())


def test_hook_sends_its_unit_to_the_stock_path() -> None:
    converted, stock = both(partial(tv, TvBasic))
    block = converted.get_submodule("layer1.0")
    seen: list[tuple[int, ...]] = []
    handle = block.get_submodule("bn1").register_forward_hook(lambda _m, _i, y: seen.append(tuple(y.shape)))
    assert_equal_runs(converted, stock, images())
    assert seen == [(4, 64, 8, 8)] * 4
    stock_rows = [row for row in fr.nn.explain(converted) if not row.fused]
    assert [row.path for row in stock_rows if row.unit.startswith("Fused")] == ["layer1.0"]
    assert "bn1 has a forward hook" in stock_rows[0].why
    handle.remove()
    assert fr.nn.explain(converted).fused == 9


def test_hooked_child_at_conversion_is_called_and_the_rest_fused() -> None:
    model = own.Activated().double()
    seen: list[Tensor] = []
    model.bn2.register_forward_hook(lambda _m, _i, y: seen.append(y))
    stock = copy.deepcopy(model)
    fr.convert(model, inplace=True)
    row = fr.nn.explain(model)[0]
    assert row.fused
    assert "bn2 has a forward hook" in row.why
    assert_equal_runs(model, stock, images(4, 6))
    assert len(seen) == 8  # deepcopy keeps the hook, whose list is shared


def test_sync_batch_norm_after_conversion() -> None:
    converted, stock = both(partial(tv, TvBottleneck))
    for model in (converted, stock):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert fr.nn.explain(converted).fused == 0
    torch.testing.assert_close(converted.eval()(images()), stock.eval()(images()))


def test_replaced_child_and_changed_setting() -> None:
    converted, stock = both(own.Optional)
    for model in (converted, stock):
        model.shortcut = nn.AvgPool2d(3, 1, 1)
    assert "shortcut has changed" in fr.nn.explain(converted)[0].why
    assert_equal_runs(converted, stock, images(4, 6))
    for model in (converted, stock):
        model.shortcut, model.alpha = None, 0.5
    assert "alpha has changed" in fr.nn.explain(converted)[0].why
    assert_equal_runs(converted, stock, images(4, 6))


@pytest.mark.parametrize("change", ["replace", "hook", "stride"])
def test_the_stem_pool_is_guarded_though_it_is_no_operand(change: str) -> None:
    converted, stock = both(partial(tv, TvBasic))
    seen: list[Tensor] = []
    for model in (converted, stock):
        assert isinstance(model.maxpool, nn.MaxPool2d)
        if change == "replace":
            model.maxpool = nn.Identity()
        elif change == "hook":
            model.maxpool.register_forward_hook(lambda _m, _i, y: seen.append(y))
        else:
            model.maxpool.stride = 1
    assert "maxpool" in fr.nn.explain(converted)[0].why
    assert_equal_runs(converted, stock, images())
    assert len(seen) == (8 if change == "hook" else 0)


def test_a_method_given_to_the_instance_is_called() -> None:
    converted, stock = both(partial(tv, TvBasic))
    for model in (converted, stock):
        plain = type(stock)._forward_impl
        model._forward_impl = MethodType(lambda self, x, plain=plain: 2 * plain(self, x), model)
    assert "_forward_impl has changed" in fr.nn.explain(converted)[0].why
    assert_equal_runs(converted, stock, images())


def test_an_identity_on_the_way_is_guarded() -> None:
    converted, stock = both(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Identity(), nn.ReLU()))
    assert fr.nn.explain(converted)[0].fused
    for model in (converted, stock):
        model[2] = nn.Softplus()
    assert "2 was replaced" in fr.nn.explain(converted)[0].why
    assert_equal_runs(converted, stock, images(4, 6))


def test_frozen_batch_norms() -> None:
    converted, stock = both(partial(tv, TvBasic))
    outputs = []
    for model in (converted, stock):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        outputs.append(model(images()))
    torch.testing.assert_close(*outputs)


def test_methods_and_feature_extraction_work() -> None:
    converted, stock = both(partial(ti, TimmBasic))
    for model in (converted, stock):
        model.eval()
    torch.testing.assert_close(converted.forward_features(images()), stock.forward_features(images()))
    torch.testing.assert_close(converted.forward_intermediates(images())[1], stock.forward_intermediates(images())[1])
    converted, stock = both(partial(tv, TvBasic))
    extract = torchvision.models.feature_extraction.create_feature_extractor
    names = ["layer1.0.relu", "layer2.0.bn2", "layer4"]
    torch.testing.assert_close(extract(converted.eval(), names)(images()), extract(stock.eval(), names)(images()))


def test_compiles_into_one_graph() -> None:
    converted, stock = both(partial(ti, TimmBasic))
    compiled = torch.compile(converted, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, images(), True), run(stock, images(), True), rtol=1e-7, atol=1e-9)


def test_scripts_as_stock() -> None:
    converted, stock = both(partial(tv, TvBasic))
    units = fr.nn.explain(converted).fused
    scripted = torch.jit.script(converted.eval())
    torch.testing.assert_close(scripted(images()), stock.eval()(images()))
    assert fr.nn.explain(converted).fused == units


def test_autocast_gives_eagers_numbers() -> None:
    torch.manual_seed(0)
    stock = tv(TvBasic)
    converted = fr.convert(stock)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = converted.eval()(images().float()), stock.eval()(images().float())
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)  # bf16 has 8 bits; 9 roundings in a row


def test_verbose_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    fr.convert(own.Loop(), verbose=True)
    assert "for loop" in capsys.readouterr().out


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="expected model to be"):
        fr.convert({})  # type: ignore[type-var]
