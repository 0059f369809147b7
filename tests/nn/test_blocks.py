"""BasicBlock and Bottleneck: torchvision's interface, and the fused forward and backward against the stock path."""

import copy
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from tests.nn.twins import BLOCKS, DTYPES, STRIDED, assert_fused_equals_stock, make, randomise, run
from tests.oracles import torchvision


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    return testing.draw(shape, dtype, channels_last=channels_last)


@pytest.mark.parametrize("name", BLOCKS)
def test_children_have_torchvisions_names_and_order(name: str) -> None:
    ours, theirs = getattr(fr.nn, name)(8, 8), getattr(torchvision.models.resnet, name)(8, 8)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "arguments",
    [{"groups": 2}, {"base_width": 128}, {"dilation": 2}],
)
def test_basic_block_refuses_what_torchvisions_refuses(arguments: dict[str, int]) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as theirs:
        torchvision.models.resnet.BasicBlock(8, 8, **arguments)
    with pytest.raises(theirs.type, match=str(theirs.value)):
        fr.nn.BasicBlock(8, 8, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(2, 7, 5), (1, 3, 3), (3, 12, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_training_equals_stock(
    name: str,
    stride: int,
    size: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
    calls: Counter[str],
) -> None:
    n, h, w = size
    block = make(name, inplanes=8 if stride == 1 else STRIDED, stride=stride, shortcut=stride == 2).to(dtype)
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    x = draw((n, 8 if stride == 1 else STRIDED, h, w), dtype, channels_last)
    runs = assert_fused_equals_stock(block, x)
    if channels_last and fr.is_available():
        assert calls == {"residual_block": runs}
        return
    convs = 2 if name == "BasicBlock" else 3
    assert calls["batch_norm_act_conv"] == (convs - 1) * runs
    assert calls["conv2d"] == stride * runs
    assert calls["dual_batch_norm_act" if stride == 2 else "batch_norm_act"] == runs


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shortcut", [False, True])
def test_evaluation_equals_stock(name: str, shortcut: bool, calls: Counter[str]) -> None:
    block = make(name, shortcut=shortcut).eval()
    assert_fused_equals_stock(block, draw((2, 8, 6, 7)))
    assert calls["batch_norm_act_conv"]


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "downsample.1"])
def test_frozen_batch_norm_uses_and_keeps_its_running_statistics(frozen: str, calls: Counter[str]) -> None:
    block = make("BasicBlock")
    norm = block.get_submodule(frozen).eval()
    before = copy.deepcopy(norm.state_dict())
    assert_fused_equals_stock(block, draw((2, 8, 5, 5)))
    block(draw((2, 8, 5, 5)))
    assert calls["batch_norm_act_conv"] == 2
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": -0.5},
        {"momentum": 1.5},
        {"eps": 0.1},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_batch_norm(options: dict[str, Any], training: bool, calls: Counter[str]) -> None:
    if "bias" in options and "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this torch has no BatchNorm2d without bias")
    block = randomise(fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, **options))).train(training)
    for _ in range(3):  # the cumulative average weighs each batch differently
        assert_fused_equals_stock(block, draw((2, 8, 5, 5)))
        block(draw((2, 8, 5, 5)))
    assert calls["batch_norm_act"] == 6


def test_track_running_stats_switched_off_later(calls: Counter[str]) -> None:
    block = make("BasicBlock")
    block.bn1.track_running_stats = False
    before = copy.deepcopy(block.bn1.state_dict())
    assert_fused_equals_stock(block, draw((2, 8, 5, 5)))
    block(draw((2, 8, 5, 5)))
    assert all(torch.equal(before[key], value) for key, value in block.bn1.state_dict().items())
    assert_fused_equals_stock(block.eval(), draw((2, 8, 5, 5)))
    assert calls["batch_norm_act_conv"] == 3


def test_statistics_are_updated_without_gradients(calls: Counter[str]) -> None:
    block = make("Bottleneck")
    with torch.no_grad():
        block(draw((2, 8, 5, 5)))
    assert calls["conv2d"] == 2
    assert (
        block.bn1.num_batches_tracked == block.bn2.num_batches_tracked == block.downsample[1].num_batches_tracked == 1
    )
    assert_fused_equals_stock(block, draw((2, 8, 5, 5)), requires_grad=False)


@pytest.mark.parametrize("keep", ["bn1.weight", "bn2.bias", "conv1.weight", "conv2.weight", "downsample.1.weight", "x"])
def test_partial_requires_grad(keep: str, fused: None) -> None:
    block = make("BasicBlock").requires_grad_(False)
    if keep != "x":
        block.get_parameter(keep).requires_grad_()
    assert_fused_equals_stock(block, draw((2, 8, 5, 5)), requires_grad=keep == "x")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_equals_stock(name: str, dtype: torch.dtype, calls: Counter[str]) -> None:
    block = make(name)
    x = draw((2, 8, 6, 6))
    with torch.autocast("cpu", dtype):
        got = run(copy.deepcopy(block), x)
        with fr.nn.stock():
            want = run(copy.deepcopy(block), x)
    assert calls["dual_batch_norm_act"] == 1
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        if value.is_floating_point():
            error = (got[key].double() - value.double()).norm()
            # Both round each stored tensor to `dtype`, at different places: a few roundings of the whole.
            assert error <= 16 * torch.finfo(dtype).eps * value.double().norm() + 1e-6, key


def test_residual_of_another_dtype_is_added_by_stock_pytorch(calls: Counter[str]) -> None:
    block = make("BasicBlock", shortcut=False)
    x = draw((2, 8, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        got = block(x)
        with fr.nn.stock():
            want = block(x)
    assert got.dtype == want.dtype
    assert (got.float() - want.float()).norm() <= 0.03 * want.float().norm()
    assert calls["batch_norm_act_conv"] == 1
    assert calls["batch_norm_act"] == 0


def test_residual_that_broadcasts_is_added_by_stock_pytorch(calls: Counter[str]) -> None:
    block = randomise(fr.nn.BasicBlock(1, 8))
    assert_fused_equals_stock(block, draw((2, 1, 5, 5)))
    assert calls["batch_norm_act_conv"] == 1
    assert calls["batch_norm_act"] == 0


def test_another_shortcut_is_called_and_its_output_fused(calls: Counter[str]) -> None:
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    block = randomise(fr.nn.BasicBlock(8, 8, 2, shortcut))
    assert_fused_equals_stock(block, draw((2, 8, 6, 6)))
    assert calls == {"conv2d": 1, "batch_norm_act_conv": 1, "batch_norm_act": 1}


def test_a_hook_in_the_shortcut_fires_and_the_rest_stays_fused(calls: Counter[str]) -> None:
    block = make("BasicBlock")
    seen = []
    block.downsample[1].register_forward_hook(lambda *_: seen.append(1))
    x = draw((2, 8, 6, 6))
    block(x)
    assert seen == [1]
    assert calls == {"conv2d": 1, "batch_norm_act_conv": 1, "batch_norm_act": 1}


@pytest.mark.parametrize("options", [{"groups": 4, "base_width": 32}, {"base_width": 128}, {"dilation": 2}], ids=str)
def test_bottleneck_variants(options: dict[str, int], calls: Counter[str]) -> None:
    block = make("Bottleneck", inplanes=16, planes=4, stride=1, shortcut=False, **options)
    assert_fused_equals_stock(block, draw((2, 16, 9, 7)))
    assert calls["batch_norm_act_conv"] == 2


def test_convolutions_with_bias(calls: Counter[str]) -> None:
    block = make("BasicBlock").eval()  # in training the batch norm takes the bias away, and its gradient is zero
    block.conv1 = nn.Conv2d(8, 8, 3, padding=1)
    block.conv2 = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
    assert_fused_equals_stock(block.double(), draw((2, 8, 6, 6), torch.float64))
    assert calls["batch_norm_act_conv"] == 1


def test_one_value_per_channel_in_training_changes_nothing(fused: None) -> None:
    block = make("BasicBlock")
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=r"more than 1 value per channel|one value per channel"):
        block(draw((1, 8, 1, 1)))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_not_a_number_and_infinity_propagate(fused: None) -> None:
    block = make("BasicBlock", shortcut=False).eval()
    x = draw((2, 8, 6, 6))
    x[0, 0, 0, 0], x[1, 1, 3, 3] = float("nan"), float("inf")
    with fr.nn.stock():
        want = block(x)
    assert torch.equal(block(x).isnan(), want.isnan())


def test_double_backward_equals_stock(fused: None) -> None:
    block = make("BasicBlock").double()
    x = draw((2, 8, 4, 4), torch.float64).requires_grad_()

    def second(module: nn.Module) -> list[Tensor]:
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *module.parameters()]))

    with fr.nn.stock():
        want = second(copy.deepcopy(block))
    for got, expected in zip(second(copy.deepcopy(block)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_gradient_layouts_and_expanded_gradients(fused: None) -> None:
    block = make("BasicBlock").double()
    x = draw((2, 8, 6, 6), torch.float64)
    grads = {}
    for name in ("plain", "expanded", "channels_last"):
        twin, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        y = twin(leaf)
        grad = torch.ones_like(y)
        if name == "expanded":
            grad = torch.ones((), dtype=y.dtype).expand_as(y)
        elif name == "channels_last":
            grad = grad.contiguous(memory_format=torch.channels_last)
        y.backward(grad)
        assert torch.equal(grad, torch.ones_like(y)), "the gradient handed in was overwritten"
        grads[name] = leaf.grad
    torch.testing.assert_close(grads["expanded"], grads["plain"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads["channels_last"], grads["plain"], rtol=1e-12, atol=1e-12)


def test_an_earlier_forward_survives_a_later_one(needs_extension: None) -> None:
    """Where stock PyTorch goes wrong: its frozen backward reads running statistics that training has moved since."""
    block = make("BasicBlock").double()
    x = draw((2, 8, 6, 6), torch.float64).requires_grad_()
    (want,) = torch.autograd.grad(copy.deepcopy(block).eval()(x).sum(), x)
    y = block.eval()(x)
    block.train()(draw((2, 8, 6, 6), torch.float64))
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_one_batch_norm_in_both_branches_with_cumulative_statistics() -> None:
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(8, momentum=None)
    block = fr.nn.BasicBlock(8, 8, downsample=nn.Sequential(nn.Conv2d(8, 8, 1), norm))
    block.bn2 = norm
    stock = copy.deepcopy(block)
    for _ in range(2):
        y = block(x)
        with fr.nn.stock():
            expected = stock(x)
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(block.bn2.running_mean, stock.bn2.running_mean)
    torch.testing.assert_close(block.bn2.running_var, stock.bn2.running_var)
    assert block.bn2.num_batches_tracked == 4
