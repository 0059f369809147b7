"""A residual block in channels_last on the CPU is one autograd node where it can be, and equals the stock one."""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from tests.nn.twins import BLOCKS, DTYPES, STRIDED, assert_fused_equals_stock, make, randomise, run
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 5), (5, 7, 7), (1, 3, 3), (3, 12, 17)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_training(name: str, stride: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, h, w = size
    c = 8 if stride == 1 else STRIDED
    block = make(name, inplanes=c, stride=stride, shortcut=stride == 2).to(dtype)
    x = draw(n, c, h, w, dtype=dtype)
    assert_whole(block, x)
    assert_fused_equals_stock(block, x)
    assert_fused_equals_stock(block.to(memory_format=torch.channels_last), x)


def _with(change: Callable[[Any], None], name: str = "BasicBlock", **options: Any) -> nn.Module:
    block = make(name, **options)
    change(block)
    return randomise(block)


def _swap(path: str, module: nn.Module) -> Callable[[nn.Module], None]:
    parent, _, child = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(parent), child, module)


def _shared(block: nn.Module) -> None:
    block.bn2 = block.bn1


def _shared_with_shortcut(block: nn.Module) -> None:
    block.downsample[1] = block.bn1


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "dilation": lambda: make("Bottleneck", shortcut=False, dilation=2),
    "wide": lambda: make("Bottleneck", base_width=128),
    "groups": lambda: make("Bottleneck", groups=2, base_width=128, planes=2),
    "no affine": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False)),
    "no running statistics": lambda: fr.nn.BasicBlock(
        8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)
    ),
    "momentum 0": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=0.0)),
    "momentum 1": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=1.0)),
    "cumulative": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None)),
    "eps": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, eps=0.3)),
    "other kernels": lambda: _with(_swap("conv2", nn.Conv2d(8, 8, (5, 3), padding=(2, 1), bias=False))),
    "large padding": lambda: _with(
        lambda b: (
            _swap("conv1", nn.Conv2d(8, 8, 3, padding=3, bias=False))(b),
            _swap("conv2", nn.Conv2d(8, 8, 5, bias=False))(b),
        )
    ),
    "shared convolution": lambda: _with(lambda b: setattr(b.conv2, "weight", b.conv1.weight)),
    "evaluation": lambda: make("Bottleneck").eval(),
    "frozen bn1": lambda: _with(lambda b: b.bn1.eval()),
    "frozen bn2": lambda: _with(lambda b: b.bn2.eval()),
    "frozen shortcut": lambda: _with(lambda b: b.downsample[1].eval()),
}
STAGES: dict[str, Callable[[], nn.Module]] = {
    "groups of two": lambda: make("Bottleneck", groups=2, base_width=64, planes=2),
    "wide groups of a small image": lambda: make("Bottleneck", groups=2, base_width=512, planes=2),
    "bias": lambda: _with(_swap("conv1", nn.Conv2d(8, 8, 3, padding=1))),
    "bias in the shortcut": lambda: _with(_swap("downsample.0", nn.Conv2d(8, 8, 1))),
    "same padding": lambda: _with(_swap("conv1", nn.Conv2d(8, 8, 3, padding="same", bias=False))),
    "reflected padding": lambda: _with(
        _swap("conv1", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False))
    ),
    "huge kernel": lambda: _with(_swap("conv1", nn.Conv2d(8, 8, (1, 17), padding=(0, 8), bias=False))),
    "foreign shortcut": lambda: _with(
        lambda b: setattr(b, "downsample", nn.Sequential(nn.Conv2d(8, 8, 1, bias=False)))
    ),
    "pooling shortcut": lambda: _with(lambda b: setattr(b, "downsample", nn.AvgPool2d(3, 1, 1))),
    "foreign norm": lambda: fr.nn.BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c)),
    "shared norms": lambda: _with(_shared),
    "norm shared with the shortcut": lambda: _with(_shared_with_shortcut),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_blocks_that_are_one_node(kind: str) -> None:
    assert_node_equals_stock(WHOLE[kind]())


@pytest.mark.parametrize("kind", STAGES)
def test_blocks_that_are_not(kind: str) -> None:
    assert_stages_equal_stock(STAGES[kind](), bias="bias" in kind)


@pytest.mark.parametrize("shared", [_shared, _shared_with_shortcut], ids=lambda f: f.__name__)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_batch_norm_at_two_positions(shared: Callable[[nn.Module], None], momentum: float | None) -> None:
    block: Any = make("BasicBlock").double()
    shared(block)
    block.bn1.momentum = momentum
    stock = copy.deepcopy(block)
    for _ in range(3):
        x = draw(3, 8, 6, 6, dtype=torch.float64)
        block(x).sum().backward()
        with fr.nn.stock():
            stock(x).sum().backward()
    for (name, got), want in zip(block.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)
    for (name, p), q in zip(block.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8, msg=name)


def _inputs() -> Iterator[tuple[str, Tensor]]:
    x = draw(2, 8, 6, 7, dtype=torch.float64)
    yield "NCHW", x.contiguous()
    yield "a column of pixels", draw(3, 8, 1, 1, dtype=torch.float64)  # both layouts at once
    yield "slice of channels", draw(2, 12, 6, 7, dtype=torch.float64)[:, 2:10]
    yield "slice of rows", draw(2, 8, 9, 7, dtype=torch.float64)[:, :, 1:7]
    yield "expanded batch", x[:1].expand(3, -1, -1, -1)
    yield "transposed", x.transpose(2, 3)


@pytest.mark.parametrize(("kind", "x"), list(_inputs()), ids=lambda v: v if isinstance(v, str) else "")
def test_inputs_of_other_strides(kind: str, x: Tensor) -> None:
    block = make("BasicBlock").double()
    assert_stages(block, x)
    assert_fused_equals_stock(block, x)


def test_one_value_per_channel_is_refused_and_changes_nothing() -> None:
    block = make("BasicBlock", stride=3, inplanes=STRIDED)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=r"more than 1 value per channel|one value per channel"):
        block(draw(1, STRIDED, 3, 2))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert_fused_equals_stock(block.eval(), draw(1, STRIDED, 3, 2))


def test_an_empty_batch() -> None:
    block = make("BasicBlock").eval()
    assert_fused_equals_stock(block, torch.zeros(0, 8, 5, 5).contiguous(memory_format=torch.channels_last))


def test_a_gradients_gradient_of_an_empty_batch() -> None:
    block = make("BasicBlock", shortcut=False)
    x = torch.zeros(0, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    (dx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, allow_unused=True, materialize_grads=True)
    assert dx.shape == ddx.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_and_counters(training: bool) -> None:
    block: Any = make("Bottleneck").train(training)
    block.bn2.momentum = None
    block.bn3.eval()
    stock = copy.deepcopy(block)
    for i in range(3):
        x = draw(4, 8, 6, 6) + i
        with torch.no_grad():
            block(x)
            with fr.nn.stock():
                stock(x)
    for (name, got), want in zip(block.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    assert int(block.bn1.num_batches_tracked) == int(block.downsample[1].num_batches_tracked) == 3 * training
    assert int(block.bn3.num_batches_tracked) == 0


def test_an_error_leaves_statistics_and_counters() -> None:
    block: Any = make("BasicBlock", shortcut=False)
    block.bn2 = nn.BatchNorm2d(7)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(RuntimeError):
        block(draw(2, 8, 5, 5))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


@pytest.mark.parametrize(
    "keep",
    [
        "x",
        "conv1.weight",
        "conv2.weight",
        "bn1.weight",
        "bn1.bias",
        "bn2.bias",
        "bn2.weight",
        "downsample.0.weight",
        "downsample.1.bias",
    ],
)
def test_partial_requires_grad(keep: str) -> None:
    block = make("BasicBlock").requires_grad_(False).double()
    if keep != "x":
        block.get_parameter(keep).requires_grad_()
    x = draw(2, 8, 5, 5, dtype=torch.float64)
    assert nodes(block(x.requires_grad_(keep == "x")))["ResidualBlock"] == 1
    assert_fused_equals_stock(block, x.detach(), requires_grad=keep == "x")


def test_without_gradients_nothing_is_recorded_or_saved() -> None:
    block = make("BasicBlock")
    x = draw(2, 8, 5, 5)
    with torch.no_grad():
        assert block(x.requires_grad_()).grad_fn is None
    with torch.inference_mode():
        quiet = copy.deepcopy(block)(draw(2, 8, 5, 5))
        assert quiet.is_inference()
    assert block.requires_grad_(False)(x.detach()).grad_fn is None
    assert_fused_equals_stock(block, x.detach(), requires_grad=False)
    assert_fused_equals_stock(block.eval(), x.detach(), requires_grad=False)


def test_saved_for_backward_is_no_normalised_tensor() -> None:
    """x, what each convolution put out, and one bit for each element of the output."""
    block = make("Bottleneck", inplanes=16, planes=8)
    x = draw(4, 16, 12, 12).requires_grad_()
    pixels = 4 * 12 * 12
    images = [pixels * c * 4 for c in (16, 8, 8, 32, 32)]
    bits, statistics = pixels * 32 // 8, 2 * 4 * (8 + 8 + 32 + 32)
    assert saved_bytes(block, x) == sum(images) + bits + statistics


def test_hooks_of_the_block_and_of_its_input() -> None:
    block = make("BasicBlock")
    seen: list[str] = []
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = draw(2, 8, 5, 5).requires_grad_()
    x.register_hook(lambda g: seen.append("x") or g * 2)
    y = block(x)
    assert nodes(y)["ResidualBlock"] == 1
    y.sum().backward()
    assert seen == ["before", "after", "backward", "x"] or seen == ["before", "after", "x", "backward"]
    twin, leaf = make("BasicBlock"), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    twin.load_state_dict(block.state_dict())
    twin(leaf).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * leaf.grad)


@pytest.mark.parametrize("child", ["conv1", "bn2", "relu", "downsample.0", "downsample.1"])
def test_hooks_of_children_fire(child: str) -> None:
    block = make("BasicBlock")
    seen: list[int] = []
    block.get_submodule(child).register_forward_hook(lambda *_: seen.append(1))
    x = draw(2, 8, 5, 5)
    assert_stages(block, x)
    seen.clear()
    block(x)
    assert len(seen) == (2 if child == "relu" else 1)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shortcut", [True, False])
def test_autocast(name: str, shortcut: bool) -> None:
    """One node where x has autocast's dtype already; as near to fp64 as stock is, over several inputs."""
    block = make(name, inplanes=16, planes=4, shortcut=shortcut)
    exact = copy.deepcopy(block).double()
    for dtype in (torch.bfloat16, torch.float32):
        errors: dict[str, list[tuple[float, float]]] = {}
        for _ in range(7):
            x = draw(2, 16, 6, 6, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                whole = "ResidualBlock" in nodes(copy.deepcopy(block)(x.clone().requires_grad_()))
                got = run(copy.deepcopy(block), x)
                with fr.nn.stock():
                    stock = run(copy.deepcopy(block), x)
            assert whole == (dtype == torch.bfloat16)
            with fr.nn.stock():
                want = run(copy.deepcopy(exact), x.double())
            for key, value in want.items():
                assert got[key].dtype == stock[key].dtype, key
                size = value.double().norm() + 1e-30
                pair = [float((t.double() - value.double()).norm() / size) for t in (got[key], stock[key])]
                errors.setdefault(key, []).append((pair[0], pair[1]))
        for key, pairs in errors.items():
            ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
            assert ours <= 2 * theirs + 4 * torch.finfo(torch.bfloat16).eps, f"{key}: {ours:.3g}, stock {theirs:.3g}"
    assert_whole(block, draw(2, 16, 6, 6))  # nothing of autocast stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_copies_no_weights(dtype: torch.dtype) -> None:
    """What is saved is as without autocast, images of half the bytes; weights' gradients are as they were summed."""
    block = make("Bottleneck", inplanes=16, planes=8)
    x = draw(4, 16, 12, 12, dtype=dtype).requires_grad_()
    pixels = 4 * 12 * 12
    images = [pixels * c * 2 for c in (16, 8, 8, 32, 32)]
    bits, statistics = pixels * 32 // 8, 2 * 4 * (8 + 8 + 32 + 32)
    with torch.autocast("cpu", dtype):
        assert saved_bytes(block, x) == sum(images) + bits + statistics
        y = block(x)
    assert y.dtype == dtype
    y.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        if parameter.dim() == 4:
            assert not torch.equal(parameter.grad.to(dtype).float(), parameter.grad), name


def test_a_gradients_gradient_under_autocast() -> None:
    block = make("BasicBlock")
    x = draw(2, 8, 5, 5, dtype=torch.bfloat16).requires_grad_()

    def second(module: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        first = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()], create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        assert isinstance(total, Tensor)
        return [*first, *torch.autograd.grad(total, [x, *module.parameters()])]

    with fr.nn.stock():
        want = second(copy.deepcopy(block))
    for got, expected in zip(second(copy.deepcopy(block)), want, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= 0.1 * expected.norm()


def test_weights_of_another_dtype_raise_as_stock_does() -> None:
    block = make("BasicBlock").to(torch.bfloat16)
    for context in (fr.nn.stock, torch.enable_grad):
        with context(), pytest.raises(RuntimeError, match=r"type|dtype"):
            block(draw(2, 8, 5, 5))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(name: str, training: bool) -> None:
    assert_compiled_equals_eager(make(name).double().train(training))


def test_copies_are_independent() -> None:
    block = make("BasicBlock")
    x = draw(2, 8, 5, 5)
    twin = copy.deepcopy(block)
    before = copy.deepcopy(block.state_dict())
    assert torch.equal(twin(x), copy.deepcopy(block)(x))
    twin(x).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_double_backward(name: str, training: bool) -> None:
    block = make(name).double().train(training)
    x = draw(2, 8, 4, 4, dtype=torch.float64).requires_grad_()

    def second(module: nn.Module) -> list[Tensor]:
        first = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, *module.parameters()])]

    with fr.nn.stock():
        want = second(copy.deepcopy(block))
    for got, expected in zip(second(copy.deepcopy(block)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(name: str, stride: int) -> None:
    block = make(name, inplanes=8 if stride == 1 else STRIDED, planes=2, stride=stride, shortcut=stride == 2).double()
    x = draw(2, 8 if stride == 1 else STRIDED, 4, 3, dtype=torch.float64).requires_grad_()
    assert_gradients_of_first_and_second_order(block, x)


def test_dtype_moves() -> None:
    block = make("BasicBlock")
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        block = block.to(dtype)
        x = draw(2, 8, 6, 6, dtype=dtype)
        assert_whole(block, x)
        assert block(x).dtype == dtype
    assert_fused_equals_stock(block, x)


@pytest.mark.parametrize("layout", ["plain", "expanded", "NCHW", "slice"])
def test_gradient_layouts(layout: str) -> None:
    block = make("BasicBlock").double()
    x = draw(2, 8, 6, 6, dtype=torch.float64).requires_grad_()
    grad = draw(2, 8, 6, 6, dtype=torch.float64)
    if layout == "expanded":
        grad = grad[:1, :, :1].expand(2, -1, 6, -1)
    elif layout == "NCHW":
        grad = grad.contiguous()
    elif layout == "slice":
        grad = draw(2, 11, 6, 6, dtype=torch.float64)[:, 2:10]
    before = grad.clone()
    results = []
    for context in (torch.enable_grad, fr.nn.stock):
        twin = copy.deepcopy(block)
        with context():
            results.append(torch.autograd.grad(twin(x), [x, *twin.parameters()], grad))
    assert torch.equal(grad, before)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_nan_and_infinity_go_where_stock_has_them() -> None:
    for name, training in itertools.product(BLOCKS, (False, True)):
        block = make(name, shortcut=False).train(training)
        x = draw(2, 8, 6, 6)
        x[0, 0, 0, 0], x[1, 1, 3, 3] = float("nan"), float("inf")
        got = run(copy.deepcopy(block), x)
        with fr.nn.stock():
            want = run(copy.deepcopy(block), x)
        for key, value in want.items():
            assert torch.equal(got[key].isnan(), value.isnan()), key


def test_memory_format_and_freshness_of_the_output() -> None:
    block = make("BasicBlock", shortcut=False).eval()
    x = draw(2, 8, 5, 5)
    before = x.clone()
    y = block(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(before, x)
    y.detach().zero_()
    assert not torch.equal(block(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_changed_before_backward_are_noticed(dtype: torch.dtype) -> None:
    block: Any = make("BasicBlock")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = block(draw(2, 8, 5, 5, dtype=dtype).requires_grad_())
    with torch.no_grad():
        block.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_later_forward_does_not_touch_an_earlier_one() -> None:
    """The running statistics that a frozen block used are saved, not looked up again."""
    block = make("BasicBlock").double().eval()
    x = draw(2, 8, 5, 5, dtype=torch.float64).requires_grad_()
    (want,) = torch.autograd.grad(block(x).sum(), x)
    y = block(x)
    block.train()(draw(2, 8, 5, 5, dtype=torch.float64))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)
