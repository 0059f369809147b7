"""Batch norm and activation in a convolution's prologue, and where they are not: every derivative against eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    "narrow, ATen's": (3, 1, 1, 1, 3, 8),
}


class Call:
    """Operands of one call in fp64; `leaves` are what it is differentiated by."""

    def __init__(
        self,
        geometry: str = "3x3",
        *,
        act: str = "relu",
        conv_bias: bool = False,
        affine: bool = True,
        training: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
            t = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)
            return channels_last(t) if len(shape) == 4 else t

        k, stride, padding, dilation, c, o = GEOMETRIES[geometry]
        self.tensors = {"x": random(2, c, 6, 7), "conv_weight": random(o, c, k, k)}
        if conv_bias:
            self.tensors["conv_bias"] = random(o)
        if affine:
            self.tensors |= {"weight": random(c, low=0.5, high=1.5), "bias": random(c)}
        if act == "prelu":
            self.tensors["act_weight"] = random(c)
        self.running = random(c), random(c, low=0.5, high=1.5)
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

    def _run(self, backend: Any, leaves: tuple[Tensor, ...]) -> Tensor:
        t = dict(zip(self.tensors, leaves, strict=True)) if leaves else dict(self.tensors)
        running = tuple(s.clone() for s in self.running)
        x, conv_weight, weight, bias = (t.pop(key, None) for key in ("x", "conv_weight", "weight", "bias"))
        y: Tensor = backend.batch_norm_act_conv(x, *running, weight, bias, conv_weight, **t, **self.options)
        return y

    def ours(self, *leaves: Tensor) -> Tensor:
        return self._run(ops, leaves)

    def eager(self, *leaves: Tensor) -> Tensor:
        return self._run(_stock, leaves)


KINDS: dict[str, Callable[[], Call]] = {
    **{act: lambda a=act: Call(act=a) for act in testing.ACTIVATIONS},
    **{f"frozen {act}": lambda a=act: Call(act=a, training=False) for act in testing.ACTIVATIONS},
    **{geometry: lambda g=geometry: Call(g) for geometry in GEOMETRIES},
    "bias": lambda: Call(conv_bias=True),
    "no affine": lambda: Call(affine=False),
    "frozen, bias": lambda: Call(training=False, conv_bias=True),
}


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


@pytest.mark.parametrize("kind", ["relu", "silu", "bias", "frozen, bias", "prelu"])
def test_gradcheck(kind: str) -> None:
    call = KINDS[kind]()
    leaves = tuple(call.leaves)
    assert gradcheck(call.ours, leaves, nondet_tol=0.0, fast_mode=True)
    assert gradgradcheck(call.ours, leaves, nondet_tol=1e-12, fast_mode=True)


@pytest.mark.parametrize("kind", ["relu", "silu", "prelu", "bias", "frozen, bias"])
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


class Layer(nn.Module):
    """A twin for comparisons in narrow dtypes: ours fused, torch's in `fr.nn.stock()`."""

    def __init__(self, act: str, *, bias: bool = False, channels: int = 24) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(channels)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        bn = (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        backend: Any = _stock if fr.nn.guard._stock_requests else ops
        y: Tensor = backend.batch_norm_act_conv(
            x, *bn, self.conv.weight, self.conv.bias, padding=1, training=self.training, act=self.act
        )
        return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["identity", "relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_as_near_to_the_exact_result_as_stock(act: str, bias: bool, training: bool, dtype: torch.dtype) -> None:
    layer = Layer(act, bias=bias).to(dtype).train(training)
    assert_fused_equals_stock(layer, testing.draw((3, 24, 9, 7), dtype, channels_last=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    layer = Layer("relu", bias=True, channels=40).to(dtype)
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


@pytest.mark.parametrize("kind", ["relu", "silu", "prelu"])
def test_saved_tensors_may_come_back_in_another_layout(kind: str) -> None:
    results = []
    for pack in (lambda t: t, lambda t: t.contiguous()):
        call = KINDS[kind]()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = call.ours(*call.leaves)
        results.append(torch.autograd.grad(y.square().sum(), call.leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_saved_are_x_and_the_weight() -> None:
    call = Call()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call.ours(*call.leaves)
    images = {t.data_ptr() for t in saved if t.dim() == 4}
    assert images == {call.tensors[name].data_ptr() for name in ("x", "conv_weight")}


def test_bad_input_changes_nothing() -> None:
    call = Call()
    x, weight = call.tensors["x"].detach(), call.tensors["conv_weight"].detach()
    mean, var = (s.clone() for s in call.running)
    four = torch.ones(4, dtype=torch.float64)
    refused: tuple[tuple[str, type[Exception], Tensor | None, dict[str, Any]], ...] = (
        (r"expected weight of shape \(9,\)", RuntimeError, four, {}),
        ("expected eps > 0", ValueError, None, {"eps": 0.0}),
        ("conv_bias", RuntimeError, None, {"conv_bias": four}),
    )
    for message, error, norm_weight, options in refused:
        with pytest.raises(error, match=message):
            ops.batch_norm_act_conv(x, mean, var, norm_weight, None, weight, padding=1, training=True, **options)
    assert torch.equal(mean, call.running[0])
    assert torch.equal(var, call.running[1])


@pytest.mark.parametrize("kind", ["relu", "silu", "bias", "ATen's"])
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
