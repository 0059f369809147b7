"""Convolution, batch norm, residual and activation as one function, and batch norm in a convolution's prologue."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from fused_resnet import ops, testing
from fused_resnet.ops import _stock
from tests.nn.twins import DTYPES, assert_fused_equals_stock, randomise
from tests.ops.conv_problems import channels_last

pytestmark = pytest.mark.usefixtures("needs_extension")

# Kernel, stride, padding, dilation, in and out channels.
GEOMETRIES = {
    "3x3": (3, 1, 1, 1, 9, 13),
    "3x3, stride": (3, 2, 1, 1, 8, 16),
    "1x1": (1, 1, 0, 1, 17, 5),
    "1x1, stride": (1, 2, 0, 1, 8, 9),
    "dilated": (3, 1, 2, 2, 9, 8),
    "ATen's": (3, 1, 4, 4, 9, 8),
    "narrow": (3, 1, 1, 1, 3, 8),
}


class Call:
    """Operands of one call in fp64; `leaves` are what it is differentiated by."""

    def __init__(
        self,
        geometry: str = "3x3",
        *,
        act: str = "relu",
        residual: bool = False,
        conv_bias: bool = False,
        affine: bool = True,
        training: bool = True,
        batch_norm_first: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
            t = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)
            return channels_last(t) if len(shape) == 4 else t

        k, stride, padding, dilation, c, o = GEOMETRIES[geometry]
        self.first = batch_norm_first
        width = c if batch_norm_first else o
        x, weight = random(2, c, 6, 7), random(o, c, k, k)
        shape = F.conv2d(x, weight, None, stride, padding, dilation).shape
        self.tensors = {"x": x, "conv_weight": weight}
        if conv_bias:
            self.tensors["conv_bias"] = random(o)
        if affine:
            self.tensors |= {"weight": random(width, low=0.5, high=1.5), "bias": random(width)}
        if residual:
            self.tensors["residual"] = random(*shape)
        if act == "prelu":
            self.tensors["act_weight"] = random(width)
        self.running = random(width), random(width, low=0.5, high=1.5)
        self.options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "training": training,
            "act": act,
            "eps": 1e-2,
        }

    @property
    def leaves(self) -> list[Tensor]:
        return [t.requires_grad_() for t in self.tensors.values()]

    def _split(self, leaves: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        t = dict(zip(self.tensors, leaves, strict=True)) if leaves else dict(self.tensors)
        return t, tuple(s.clone() for s in self.running)

    def ours(self, *leaves: Tensor) -> Tensor:
        t, running = self._split(leaves)
        x, conv_weight, weight, bias = (t.pop(k, None) for k in ("x", "conv_weight", "weight", "bias"))
        assert x is not None
        assert conv_weight is not None
        if self.first:
            return ops.batch_norm_act_conv(x, *running, weight, bias, conv_weight, **t, **self.options)
        return ops.conv_bn_act(x, conv_weight, *running, weight, bias, **t, **self.options)

    def eager(self, *leaves: Tensor) -> Tensor:
        t, running = self._split(leaves)
        options = dict(self.options)
        geometry = {key: options.pop(key) for key in ("stride", "padding", "dilation")}
        norm = (*running, t.get("weight"), t.get("bias"))
        options["act_weight"] = t.get("act_weight")
        convolve: Callable[[Tensor], Tensor] = lambda x: _stock.conv2d(  # noqa: E731
            x, t["conv_weight"], t.get("conv_bias"), **geometry
        )
        if self.first:
            return convolve(_stock.batch_norm_act(t["x"], *norm, **options))
        return _stock.batch_norm_act(convolve(t["x"]), *norm, residual=t.get("residual"), **options)


def kinds() -> dict[str, Callable[[], Call]]:
    found: dict[str, Callable[[], Call]] = {}
    for act in testing.ACTIVATIONS:
        for residual in (False, True):
            found[f"{act}{', residual' if residual else ''}"] = lambda a=act, r=residual: Call(act=a, residual=r)
    for geometry in GEOMETRIES:
        found[geometry] = lambda g=geometry: Call(g)
        found[f"{geometry}, norm first"] = lambda g=geometry: Call(g, batch_norm_first=True)
    for act in testing.ACTIVATIONS:
        found[f"{act}, norm first"] = lambda a=act: Call(act=a, batch_norm_first=True)
    for first in (False, True):
        name = ", norm first" if first else ""
        found[f"bias{name}"] = lambda f=first: Call(conv_bias=True, batch_norm_first=f)
        found[f"no affine{name}"] = lambda f=first: Call(affine=False, batch_norm_first=f)
        found[f"frozen{name}"] = lambda f=first: Call(training=False, conv_bias=True, batch_norm_first=f)
        found[f"frozen silu{name}"] = lambda f=first: Call(training=False, act="silu", batch_norm_first=f)
    found["frozen, residual"] = lambda: Call(training=False, residual=True)
    found["bias, residual"] = lambda: Call(conv_bias=True, residual=True)
    return found


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_of_first_and_second_order(kind: str) -> None:
    call = KINDS[kind]()
    results = []
    for function in (call.ours, call.eager):
        y = function(*call.leaves)
        first = torch.autograd.grad(y.square().sum(), call.leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), call.leaves)
        plain = torch.autograd.grad(function(*call.leaves).square().sum(), call.leaves)
        results.append((y, *first, *second, *plain))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
        assert got.shape == want.shape


@pytest.mark.parametrize(
    "kind", ["relu", "relu, residual", "silu", "bias", "frozen", "prelu", "relu, norm first", "bias, norm first"]
)
def test_gradcheck(kind: str) -> None:
    call = KINDS[kind]()
    leaves = tuple(call.leaves)
    assert gradcheck(call.ours, leaves, nondet_tol=0.0, fast_mode=True)
    assert gradgradcheck(call.ours, leaves, nondet_tol=1e-12, fast_mode=True)


@pytest.mark.parametrize(
    "kind", ["relu", "relu, residual", "identity, residual", "silu, residual", "prelu", "bias", "bias, norm first"]
)
def test_every_subset_of_gradients(kind: str) -> None:
    full = KINDS[kind]()
    want = torch.autograd.grad(full.ours(*full.leaves).square().sum(), full.leaves)
    for i in range(len(want)):
        for alone in (True, False):
            call = KINDS[kind]()
            tensors = list(call.tensors.values())
            for j, t in enumerate(tensors):
                t.requires_grad_((i == j) == alone)
            call.ours().square().sum().backward()
            for j, (t, expected) in enumerate(zip(tensors, want, strict=True)):
                if (i == j) != alone:
                    assert t.grad is None
                    continue
                assert t.grad is not None
                torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_running_statistics_are_those_of_the_biased_output(momentum: float) -> None:
    call = Call(conv_bias=True)
    t = call.tensors
    results = []
    for function in (ops.conv_bn_act, None):
        mean, var = (s.clone() for s in call.running)
        if function is not None:
            function(t["x"], t["conv_weight"], mean, var, conv_bias=t["conv_bias"], padding=1, training=True,
                     momentum=momentum)  # fmt: skip
        else:
            F.batch_norm(F.conv2d(t["x"], t["conv_weight"], t["conv_bias"], padding=1), mean, var, None, None, True,
                         momentum)  # fmt: skip
        results.append((mean, var))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Layer(nn.Module):
    """A twin for comparisons in narrow dtypes: ours fused, torch's in `fr.nn.stock()`."""

    def __init__(
        self, act: str, first: bool, *, bias: bool = False, residual: bool = False, channels: int = 24
    ) -> None:
        super().__init__()
        self.act, self.first, self.residual = act, first, residual
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(channels)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        bn = (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        options: dict[str, Any] = {"training": self.training, "act": self.act}
        backend: Any = _stock if fr.nn.guard._stock_requests else ops
        if self.first:
            y: Tensor = backend.batch_norm_act_conv(x, *bn, self.conv.weight, self.conv.bias, padding=1, **options)
            return y
        residual = x if self.residual else None
        if backend is ops:
            return ops.conv_bn_act(
                x, self.conv.weight, *bn, conv_bias=self.conv.bias, padding=1, residual=residual, **options
            )
        z = _stock.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        return _stock.batch_norm_act(z, *bn, residual=residual, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("act", "first", "options"),
    [
        ("relu", False, {}),
        ("relu", False, {"residual": True}),
        ("identity", False, {"bias": True}),
        ("silu", False, {"residual": True}),
        ("leaky_relu", False, {}),
        ("relu", True, {}),
        ("tanh", True, {"bias": True}),
    ],
    ids=str,
)
def test_as_near_to_the_exact_result_as_stock(
    act: str, first: bool, options: dict[str, bool], training: bool, dtype: torch.dtype
) -> None:
    layer = Layer(act, first, **options).to(dtype).train(training)
    if training and options.get("bias") and not first:
        layer.conv.bias.requires_grad_(False)  # type: ignore[union-attr]  # the batch norm takes it away: no gradient
    assert_fused_equals_stock(layer, testing.draw((3, 24, 9, 7), dtype, channels_last=True))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(first: bool, dtype: torch.dtype) -> None:
    layer = Layer("relu", first, bias=True, channels=40).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            x = testing.draw((5, 40, 23, 19), dtype, generator=torch.Generator().manual_seed(2), channels_last=True)
            x.requires_grad_()
            y = layer(x)
            grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
        finally:
            torch.set_num_threads(before)
        results.append((y, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", ["relu", "relu, residual", "silu, residual", "prelu", "relu, norm first"])
def test_saved_tensors_may_come_back_in_another_layout(kind: str) -> None:
    results = []
    for pack in (lambda t: t, lambda t: t.contiguous()):
        call = KINDS[kind]()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = call.ours(*call.leaves)
        results.append(torch.autograd.grad(y.square().sum(), call.leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_saved_is_no_normalised_tensor() -> None:
    call = Call()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call.ours(*call.leaves)
    images = [t for t in saved if t.dim() == 4]
    assert len(images) == 3, "x, the weight and what the convolution put out"
    assert not any(t.data_ptr() == y.data_ptr() for t in images)


def test_bad_input_changes_nothing() -> None:
    call = Call()
    x, weight = call.tensors["x"].detach(), call.tensors["conv_weight"].detach()
    mean, var = (s.clone() for s in call.running)
    options: dict[str, Any] = {"padding": 1, "training": True}
    for message, error, arguments in (
        (r"expected weight of shape \(13,\)", RuntimeError, {"bn_weight": torch.ones(4, dtype=torch.float64)}),
        ("expected residual of shape", RuntimeError, {"residual": x}),
        ("expected eps > 0", ValueError, {"eps": 0.0}),
        ("conv_bias", RuntimeError, {"conv_bias": torch.ones(4, dtype=torch.float64)}),
    ):
        with pytest.raises(error, match=message):
            ops.conv_bn_act(x, weight, mean, var, **options, **arguments)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.conv_bn_act(x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last), weight, mean, var, **options)
    with pytest.raises(TypeError, match="conv_bn_act: expected stride to be"):
        ops.conv_bn_act(x, weight, mean, var, stride="two")  # type: ignore[arg-type]
    assert torch.equal(mean, call.running[0])
    assert torch.equal(var, call.running[1])


@pytest.mark.parametrize("kind", ["relu", "relu, residual", "silu", "bias", "relu, norm first", "ATen's"])
def test_compiled_equals_eager(kind: str) -> None:
    call = KINDS[kind]()
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager", dynamic=kind == "relu")
    results = []
    for function in (compiled, call.ours):
        y = function(*call.leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), call.leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert got.stride() == want.stride()
    torch._dynamo.reset()
