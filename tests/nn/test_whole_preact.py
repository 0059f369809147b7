"""A pre-activation block in channels_last on the CPU is one autograd node where it can be, and equals the stock one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from tests.nn.twins import DTYPES, STRIDED, assert_fused_equals_stock, randomise, run
from tests.nn.whole import (
    assert_compiled_equals_eager,
    assert_gradients_of_first_and_second_order,
    assert_node_equals_stock,
    assert_stages,
    assert_stages_equal_stock,
    assert_whole,
    draw,
    nodes,
    saved_bytes,
)

pytestmark = pytest.mark.usefixtures("needs_extension")

BLOCKS = ("PreActBasicBlock", "PreActBottleneck")


def make(name: str, stride: int = 1, inplanes: int = 8, **options: Any) -> Any:
    """Eight channels at its end."""
    block = getattr(fr.nn, name)
    downsample = nn.Conv2d(inplanes, 8, 1, stride, bias=False) if stride != 1 or inplanes != 8 else None
    return randomise(block(inplanes, 8 // block.expansion, stride, downsample, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 5), (5, 7, 7), (1, 3, 3), (3, 12, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_training(name: str, stride: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, h, w = size
    c = 8 if stride == 1 else STRIDED
    block = make(name, stride, c).to(dtype)
    x = draw(n, c, h, w, dtype=dtype)
    assert_whole(block, x)
    assert_fused_equals_stock(block, x)
    assert_fused_equals_stock(block.eval(), x)


def _with(change: Callable[[Any], None], name: str = "PreActBasicBlock", **options: Any) -> nn.Module:
    block = make(name, **options)
    change(block)
    return randomise(block)


def _share(block: Any) -> None:
    block.bn2 = block.bn1


def _norm(**options: Any) -> Callable[[int], nn.Module]:
    return lambda c: nn.BatchNorm2d(c, **options)


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "no affine": lambda: make("PreActBasicBlock", norm_layer=_norm(affine=False)),
    "no running statistics": lambda: make("PreActBottleneck", norm_layer=_norm(track_running_stats=False)),
    "momentum 0": lambda: make("PreActBasicBlock", norm_layer=_norm(momentum=0.0)),
    "cumulative": lambda: make("PreActBottleneck", norm_layer=_norm(momentum=None)),
    "eps": lambda: make("PreActBasicBlock", norm_layer=_norm(eps=0.3)),
    "frozen bn1": lambda: _with(lambda b: b.bn1.eval()),
    "frozen bn2": lambda: _with(lambda b: b.bn2.eval()),
    "frozen bn1, stride": lambda: _with(lambda b: b.bn1.eval(), "PreActBottleneck", stride=2),
    "stride": lambda: make("PreActBasicBlock", stride=2),
    "other kernels": lambda: _with(lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, (5, 3), padding=(2, 1), bias=False))),
    "shared convolution": lambda: _with(lambda b: setattr(b.conv2, "weight", b.conv1.weight)),
}
STAGES: dict[str, Callable[[], nn.Module]] = {
    "bias": lambda: _with(lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, 3, padding=1))),
    "bias of the shortcut": lambda: _with(lambda b: setattr(b, "downsample", nn.Conv2d(8, 8, 1))),
    "groups": lambda: _with(lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))),
    "foreign shortcut": lambda: _with(lambda b: setattr(b, "downsample", nn.AvgPool2d(3, 1, 1))),
    "huge kernel": lambda: _with(lambda b: setattr(b, "conv1", nn.Conv2d(8, 8, (1, 17), padding=(0, 8), bias=False))),
    "shared norms": lambda: _with(_share),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_blocks_that_are_one_node(kind: str) -> None:
    assert_node_equals_stock(WHOLE[kind]())


@pytest.mark.parametrize("kind", STAGES)
def test_blocks_that_are_not(kind: str) -> None:
    assert_stages_equal_stock(STAGES[kind](), bias=kind == "bias")


@pytest.mark.parametrize("name", BLOCKS)
def test_inputs_that_do_not_fit(name: str) -> None:
    block = make(name).double()
    nhwc = draw(2, 8, 6, 7, dtype=torch.float64)
    for x in (nhwc.contiguous(), draw(3, 8, 1, 1, dtype=torch.float64), nhwc[:1].expand(3, -1, -1, -1)):
        assert_stages(block, x)
        assert_fused_equals_stock(block, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_one_value_per_channel_is_refused(name: str) -> None:
    block = make(name, 3, STRIDED)
    with pytest.raises(ValueError, match=r"more than 1 value per channel|one value per channel"):
        block(draw(1, STRIDED, 3, 2))
    assert_fused_equals_stock(block.eval(), draw(1, STRIDED, 3, 2))


@pytest.mark.parametrize("name", BLOCKS)
def test_an_error_leaves_statistics_and_counters(name: str) -> None:
    block = make(name)
    block.bn2 = nn.BatchNorm2d(7)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(RuntimeError, match=r"running_mean|weight"):
        block(draw(2, 8, 5, 5))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "keep", ["x", "bn1.weight", "bn1.bias", "conv1.weight", "bn2.bias", "bn2.weight", "conv2.weight"]
)
def test_partial_requires_grad(keep: str, stride: int) -> None:
    for name in BLOCKS:
        block = make(name, stride).requires_grad_(False).double()
        if keep != "x":
            block.get_parameter(keep).requires_grad_()
        x = draw(2, 8, 5, 5, dtype=torch.float64)
        assert nodes(block(x.requires_grad_(keep == "x")))["ResidualBlock"] == 1
        assert_fused_equals_stock(block, x.detach(), requires_grad=keep == "x")


def test_the_shortcut_alone_requires_grad() -> None:
    block = make("PreActBasicBlock", 2).requires_grad_(False).double()
    block.downsample.requires_grad_()
    assert_fused_equals_stock(block, draw(2, 8, 5, 5, dtype=torch.float64), requires_grad=False)


def test_saved_for_backward_is_neither_normalised_nor_the_output() -> None:
    block = randomise(fr.nn.PreActBottleneck(32, 8))
    x = draw(4, 32, 12, 12).requires_grad_()
    pixels = 4 * 12 * 12
    assert saved_bytes(block, x) == sum(pixels * c * 4 for c in (32, 8, 8)) + 2 * 4 * (32 + 8 + 8)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("child", ["conv1", "bn2", "relu"])
def test_hooks_of_children_fire(name: str, child: str) -> None:
    block = make(name)
    seen: list[int] = []
    block.get_submodule(child).register_forward_hook(lambda *_: seen.append(1))
    x = draw(2, 8, 5, 5)
    assert_stages(block, x)
    assert seen


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_autocast(name: str, stride: int) -> None:
    block = make(name, stride)
    for dtype in (torch.bfloat16, torch.float32):
        x = draw(2, 8, 6, 6, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            whole = "ResidualBlock" in nodes(copy.deepcopy(block)(x.clone().requires_grad_()))
            got = run(copy.deepcopy(block), x)
            with fr.nn.stock():
                stock = run(copy.deepcopy(block), x)
        assert whole == (dtype == torch.bfloat16)
        for key, value in stock.items():
            assert got[key].dtype == value.dtype, key
            size = value.double().norm() + 1e-3
            assert (got[key].double() - value.double()).norm() <= 0.1 * size, key


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(name: str, training: bool) -> None:
    assert_compiled_equals_eager(make(name, 2).double().train(training))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_first_and_second_order(name: str, stride: int) -> None:
    block = make(name, stride, 8 if stride == 1 else STRIDED).double()
    x = draw(2, 8 if stride == 1 else STRIDED, 4, 3, dtype=torch.float64).requires_grad_()
    assert_gradients_of_first_and_second_order(block, x)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    block = make(name, 2).to(dtype)
    x = draw(9, 8, 41, 37, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(run(copy.deepcopy(block), x))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())
