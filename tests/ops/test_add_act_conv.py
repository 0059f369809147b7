"""add_act, conv2d and conv_bn_act against fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.ops import _stock
from fused_resnet.testing import Reference, assert_close, draw
from tests.ops.cases import DTYPES, LAYOUTS

SHAPES = ((2, 3, 7, 5), (1, 13, 1, 1), (3, 65, 5, 3), (5, 1, 7, 5), (1, 34, 9, 17), (2, 8, 33, 17))
# kernel, stride, padding, dilation, groups: those of ResNet and ResNeXt, and uneven ones
GEOMETRIES: tuple[tuple[tuple[int, int], ...] | tuple[int, ...], ...] = (
    (1, 1, 0, 1, 1),
    (1, 2, 0, 1, 1),
    (3, 1, 1, 1, 1),
    (3, 2, 1, 1, 1),
    (7, 2, 3, 1, 1),
    (3, 1, 2, 2, 1),
    (3, 1, 1, 1, 4),
    (3, 2, 1, 1, 8),
    ((3, 1), (1, 2), (1, 0), (1, 1), 2),
)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", testing.ACTIVATIONS)
@pytest.mark.usefixtures("fused_or_double")
def test_add_act(act: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for layout in LAYOUTS:
            last = layout == "NHWC"
            x, r, dy = (draw(shape, dtype, channels_last=last) for _ in range(3))
            r = torch.where((x + r).abs() < 0.05, r + 0.25, r)  # keep clear of the kink
            slope = draw((shape[1],), testing.accumulator(dtype), mean=0.25, std=0.2) if act == "prelu" else None
            leaves = [_leaf(t) for t in (x, r, *(() if slope is None else (slope,)))]
            y = fr.ops.add_act(
                leaves[0], leaves[1], act, negative_slope=0.1, act_weight=leaves[2] if slope is not None else None
            )
            y.backward(dy)
            assert y.dtype == dtype
            wide = [_leaf(t.double()) for t in leaves]
            pre = wide[0] + wide[1]
            exact = testing.activation(pre, act, negative_slope=0.1, act_weight=wide[2] if slope is not None else None)
            exact.backward(dy.double())
            magnitude = (wide[0].abs() + wide[1].abs()).detach()
            grads = dy.double().abs() * (1.1 + magnitude)
            assert_close(y, Reference(exact.detach(), magnitude + exact.detach().abs()), name=f"y {shape} {layout}")
            for name, leaf, ref in zip(("grad_x", "grad_residual", "grad_act_weight"), leaves, wide, strict=False):
                assert leaf.grad is not None
                assert ref.grad is not None
                slope_terms = (dy.double().abs() * magnitude).sum((0, 2, 3))
                scale = slope_terms if name == "grad_act_weight" else grads
                length = y.numel() // shape[1] if name == "grad_act_weight" else 1
                reference = Reference(ref.grad, scale, length)
                assert_close(leaf.grad, reference, compute_dtype=dtype, name=f"{name} {shape} {layout}")


def test_add_act_keeps_the_sign_of_zero() -> None:
    x = torch.tensor([-0.0, -0.0, 0.0, 0.0]).view(1, 4, 1, 1)
    r = torch.tensor([-0.0, 0.0, -0.0, 0.0]).view(1, 4, 1, 1)
    for act in testing.ACTIVATIONS:
        slope = torch.full((4,), 0.25) if act == "prelu" else None
        y = fr.ops.add_act(x, r, act, act_weight=slope)
        expected = testing.activation(x + r, act, act_weight=slope)
        assert torch.equal(y, expected), act
        assert torch.equal(torch.signbit(y), torch.signbit(expected)), act


@pytest.mark.parametrize("act", ["relu", "prelu", "identity"])
@pytest.mark.parametrize("training", [False, True])
def test_narrow_parameters_and_a_wide_residual(act: str, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 4).bfloat16().requires_grad_()
    residual = torch.randn(2, 6, 5, 4).requires_grad_()
    weight, bias, slope = (torch.rand(6).bfloat16().requires_grad_() for _ in range(3))
    results = []
    for op in (fr.ops.batch_norm_act, _stock.batch_norm_act):
        mean, var = torch.zeros(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)
        act_weight = slope if act == "prelu" else None
        y = op(x, mean, var, weight, bias, residual=residual, training=training, act=act, act_weight=act_weight)
        inputs = [x, residual, weight, bias, *([slope] if act == "prelu" else [])]
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs), mean, var])
    for got, want in zip(*results, strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_add_act_of_two_dtypes_computes_as_eager_promotes() -> None:
    for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, r = draw((2, 5, 4, 3), a), draw((2, 5, 4, 3), b)
        y = fr.ops.add_act(x, r)
        assert y.dtype == torch.float32
        assert torch.equal(y, torch.relu(x + r))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]) -> Tensor:
    _, stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.usefixtures("fused_or_double")
def test_conv2d(geometry: tuple[int, ...], dtype: torch.dtype) -> None:
    kernel, stride, padding, dilation, groups = geometry
    extent = (kernel, kernel) if isinstance(kernel, int) else kernel
    for layout in LAYOUTS:
        for with_bias in (False, True):
            x = _leaf(draw((2, 16, 11, 9), dtype, channels_last=layout == "NHWC"))
            weight = _leaf(draw((24, 16 // groups, *extent), dtype, std=0.2))
            bias = _leaf(draw((24,), dtype)) if with_bias else None
            y = fr.ops.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
            dy = draw(tuple(y.shape), dtype, channels_last=layout == "NHWC")
            y.backward(dy)
            wide = [_leaf(t.double()) for t in (x, weight, *(() if bias is None else (bias,)))]
            tall = [_leaf(t.abs()) for t in wide]
            exact = _convolve(wide[0], wide[1], wide[2] if with_bias else None, geometry)
            scale = _convolve(tall[0], tall[1], tall[2] if with_bias else None, geometry)
            exact.backward(dy.double())
            scale.backward(dy.double().abs())
            terms = weight[0].numel()
            assert_close(y, Reference(exact.detach(), scale.detach(), terms), name=f"y {layout}")
            for i, leaf in enumerate((x, weight, *(() if bias is None else (bias,)))):
                grad, ref, magnitude = leaf.grad, wide[i].grad, tall[i].grad
                assert grad is not None
                assert ref is not None
                assert magnitude is not None
                # Some of ATen's own convolution kernels sum gradients in the narrow dtype's own steps.
                length = max(y.numel() // y.shape[1], 24 * extent[0] * extent[1])
                assert_close(grad, Reference(ref, magnitude, length), name=f"gradient {i} {layout} bias={with_bias}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_conv_bn_act(with_residual: bool, training: bool) -> None:
    for dtype in (torch.float64, torch.float32):
        for layout in LAYOUTS:
            last = layout == "NHWC"
            x = draw((3, 6, 9, 8), dtype, channels_last=last)
            weight, conv_bias = draw((10, 6, 3, 3), dtype, std=0.3), draw((10,), dtype)
            gamma, beta = draw((10,), dtype, mean=1.0), draw((10,), dtype)
            mean, var = draw((10,), dtype), draw((10,), dtype).abs() + 0.5
            residual = draw((3, 10, 5, 4), dtype, channels_last=last) if with_residual else None
            dy = draw((3, 10, 5, 4), dtype, channels_last=last)
            names = ("x", "weight", "gamma", "beta", "conv_bias", "residual")
            operands = (x, weight, gamma, beta, conv_bias, residual)
            leaves = [None if t is None else _leaf(t) for t in operands]
            wide = [None if t is None else _leaf(t.double()) for t in operands]
            running, exact_running = (mean.clone(), var.clone()), (mean.double(), var.double())
            outputs = []
            for (a, w, g, b, c, r), stats in ((leaves, running), (wide, exact_running)):
                assert a is not None
                assert w is not None
                if stats is running:
                    y = fr.ops.conv_bn_act(
                        a, w, *stats, g, b, conv_bias=c, stride=2, padding=1, residual=r, training=training, act="silu"
                    )
                else:
                    z = F.conv2d(a, w, c, 2, 1)
                    n = F.batch_norm(z, *stats, g, b, training, 0.1, 1e-5)
                    y = F.silu(n if r is None else n + r)
                y.backward(dy.to(y.dtype))
                outputs.append(y.detach())
            # Two operators in a row, each within its own bound: compare by the tensor's largest value.
            length = 6 * 9 + 60
            assert_close(outputs[0], outputs[1], reduction_length=length, name="y")
            for name, got, ref in zip(names, leaves, wide, strict=True):
                if got is None or ref is None:
                    continue
                assert got.grad is not None
                assert ref.grad is not None
                if name == "conv_bias" and training:  # batch statistics remove it: what is left is rounding
                    assert got.grad.abs().max() <= 1e3 * testing.unit_roundoff(dtype)
                    continue
                assert_close(got.grad, ref.grad, reduction_length=length, name=f"grad_{name}")
            for got, ref in zip(running, exact_running, strict=True):
                assert_close(got, ref, reduction_length=length)
