"""Convolutions with the batch norms around them: random, exactly representable operands and the fp64 results.

A problem is one call of each of `conv2d_norm_forward`, `conv2d_norm_backward_data` and `conv2d_norm_backward_weight`.
What a convolution multiplies is rounded to the activations' dtype where the CPU multiplies in it: one rounding of each
operand that is computed on the way, none of what is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import testing
from fused_resnet.testing import Reference

# The activations that have no parameter, in the order of the operators' `act`.
ACTIVATIONS = tuple(act for act in testing.ACTIVATIONS if act != "prelu")
SLOPE = 0.1
Pair = tuple[int, int]


def op(name: str) -> Any:
    return getattr(torch.ops.fused_resnet, name).default


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Problem:
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    dtype: torch.dtype = torch.float32
    act: str | None = None  # of the input's batch norm; None: there is none
    affine: bool = True
    output_norm: str | None = None  # gradients through the output's batch norm: "train", "eval" or None
    mask: bool = False  # of the output's gradient
    skip: str | None = None  # a gradient added to that of what is convolved: "plain", "masked" or None
    weight_layout: str = "NHWC"
    seed: int = 0
    groups: int = 1
    float_weight: bool = False  # float32 with activations of fewer bits, as under autocast

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.float_weight else self.dtype

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def out(self) -> Pair:
        extents = (self.h, self.w)
        h, w = (
            (extents[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        )
        return h, w

    @property
    def valid(self) -> bool:
        return min(self.out) > 0

    @property
    def terms(self) -> int:
        """Products behind one element of the output."""
        return self.c // self.groups * self.kernel[0] * self.kernel[1]


@dataclass
class Norm:
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def pre(self, x: Tensor) -> Reference:
        """norm(x) in fp64 and the magnitude of its terms."""
        mean, rstd = column(self.mean), column(self.rstd)
        weight = torch.ones_like(rstd) if self.weight is None else column(self.weight)
        bias = torch.zeros_like(rstd) if self.bias is None else column(self.bias)
        value = (x.double() - mean) * rstd * weight + bias
        scale = (x.double().abs() + mean.abs()) * rstd * weight.abs() + bias.abs()
        return Reference(value, scale)


def column(t: Tensor) -> Tensor:
    return t.double().view(1, -1, 1, 1)


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    norm: Norm | None
    dy: Tensor
    z: Tensor | None
    z_norm: Norm | None
    grad_z_weight: Tensor | None
    grad_z_bias: Tensor | None
    mask: Tensor | None  # bool, of dy's shape
    skip: Tensor | None
    skip_mask: Tensor | None  # bool, of x's shape


def draw(p: Problem) -> Operands:
    """Operands of one problem. Activation inputs keep clear of where a derivative jumps."""
    generator = torch.Generator().manual_seed(p.seed)
    stat = testing.accumulator(p.dtype)

    def image(*shape: int, mean: float = 0.0) -> Tensor:
        return testing.draw(shape, p.dtype, generator=generator, mean=mean, channels_last=True)

    def vector(size: int, mean: float, std: float) -> Tensor:
        return testing.draw((size,), stat, generator=generator, mean=mean, std=std)

    def norm(size: int, affine: bool) -> Norm:
        rstd = vector(size, 0.0, 0.4).abs() + 0.5
        weight, bias = (vector(size, 0.5, 0.7), vector(size, 0.2, 0.5)) if affine else (None, None)
        return Norm(vector(size, 0.3, 0.5), rstd, weight, bias)

    def bits(t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=generator) < 0.6

    x = image(p.n, p.c, p.h, p.w, mean=0.25)
    weight = testing.draw((p.k, p.c // p.groups, *p.kernel), p.weight_dtype, generator=generator, std=0.5)
    if p.weight_layout == "NHWC":
        weight = channels_last(weight)
    x_norm = None if p.act is None else norm(p.c, p.affine)
    if x_norm is not None and p.act in ("relu", "leaky_relu"):
        x = testing.avoid_kinks(x, x_norm.pre, dtype=p.dtype)
    dy = image(p.n, p.k, *p.out, mean=0.1)
    through = p.output_norm is not None
    count = p.n * p.out[0] * p.out[1]
    skip = None if p.skip is None else image(p.n, p.c, p.h, p.w)
    return Operands(
        x=x,
        weight=weight,
        norm=x_norm,
        dy=dy,
        z=image(p.n, p.k, *p.out, mean=-0.3) if through else None,
        z_norm=norm(p.k, p.affine) if through else None,
        grad_z_weight=vector(p.k, 0.0, 0.3) * count if p.output_norm == "train" else None,
        grad_z_bias=vector(p.k, 0.0, 0.3) * count if p.output_norm == "train" else None,
        mask=bits(dy) if p.mask else None,
        skip=skip,
        skip_mask=bits(skip) if skip is not None and p.skip == "masked" else None,
    )


def packed_bits(mask: Tensor | None) -> Tensor | None:
    """One bit for each element, each pixel's channels in whole bytes, as `batch_norm_act_add` saves them."""
    if mask is None:
        return None
    n, c, h, w = mask.shape
    rows = mask.permute(0, 2, 3, 1).reshape(n * h * w, c)
    rows = F.pad(rows, (0, -c % 8)).view(n * h * w, -1, 8).int()
    return (rows << torch.arange(8)).sum(2).to(torch.uint8).flatten()


def activation(pre: Tensor, act: str) -> Tensor:
    return testing.activation(pre, act, negative_slope=SLOPE)


def _convolve(p: Problem, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, p.stride, p.padding, p.dilation, p.groups)


def _transposed(p: Problem, dz: Tensor, weight: Tensor, want_weight: bool, a: Tensor) -> Tensor:
    wanted = [not want_weight, want_weight, False]
    found = torch.ops.aten.convolution_backward(
        dz, a, weight, None, p.stride, p.padding, p.dilation, False, [0, 0], p.groups, wanted
    )
    result: Tensor = found[1] if want_weight else found[0]
    return result


def convolved(p: Problem, o: Operands) -> Reference:
    """What the convolution reads: x, or its normalised activation. `stored`: the part that may be rounded."""
    x = o.x.double()
    if o.norm is None:
        return Reference(x, x.abs(), stored=torch.zeros_like(x))
    assert p.act is not None
    pre = o.norm.pre(o.x)
    a = activation(pre.value, p.act)
    return Reference(a, pre.scale + a.abs(), stored=a.abs())


def output_gradient(p: Problem, o: Operands) -> Reference:
    """The gradient at the convolution's output."""
    g = o.dy.double()
    if o.mask is not None:
        g = torch.where(o.mask, g, 0.0)
    if o.z is None or o.z_norm is None:
        return Reference(g, g.abs(), stored=torch.zeros_like(g))
    count = p.n * p.out[0] * p.out[1]
    rstd = column(o.z_norm.rstd)
    gain = rstd * (1.0 if o.z_norm.weight is None else column(o.z_norm.weight))
    value, terms = g, g.abs()
    if o.grad_z_weight is not None and o.grad_z_bias is not None:
        mean = column(o.z_norm.mean)
        dweight, dbias = column(o.grad_z_weight) / count, column(o.grad_z_bias) / count
        value = g - dbias - (o.z.double() - mean) * rstd * dweight
        terms = g.abs() + dbias.abs() + (o.z.double().abs() + mean.abs()) * rstd * dweight.abs()
    return Reference(gain * value, gain.abs() * terms, stored=(gain * value).abs())


def reference(p: Problem, o: Operands) -> dict[str, Reference]:
    """`z mean var grad_x grad_weight grad_bias grad_conv_weight`; the norm's gradients only where it has one."""
    a, dz, w = convolved(p, o), output_gradient(p, o), o.weight.double()
    count = p.n * p.out[0] * p.out[1]
    z = _convolve(p, a.value, w)
    z_scale, z_stored = _convolve(p, a.scale, w.abs()), _convolve(p, torch.as_tensor(a.stored), w.abs())
    if p.float_weight:  # rounded too
        z_stored = z_stored + _convolve(p, a.value.abs(), w.abs())
    result = {"z": Reference(z, z_scale, p.terms, z_stored)}

    # Statistics are of z as it is computed or as it is stored: both are z to one rounding.
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    error = (z.abs() + z_stored).square().mean((0, 2, 3)).sqrt()
    terms = z_scale.square().mean((0, 2, 3)).sqrt()
    std = var.sqrt()
    # Sums are of z minus one of its values: the worst of them is allowed here, test_conv_statistics.py asks for more.
    spread = (z - column(mean)).square().amax((0, 2, 3))
    length = max(count, p.terms)
    result["mean"] = Reference(mean, terms, length, error)
    result["var"] = Reference(var, var + spread + 2 * std * terms, length, 2 * std * error + error.square() * 2**-8)

    da = _transposed(p, dz.value, w, False, a.value)
    da_scale = _transposed(p, dz.scale, w.abs(), False, a.value)
    da_stored = _transposed(p, torch.as_tensor(dz.stored), w.abs(), False, a.value)
    if p.float_weight:
        da_stored = da_stored + _transposed(p, dz.value.abs(), w.abs(), False, a.value)
    if o.skip is not None:
        skip = o.skip.double() if o.skip_mask is None else torch.where(o.skip_mask, o.skip.double(), 0.0)
        da, da_scale = da + skip, da_scale + skip.abs()
    length = p.k // p.groups * p.kernel[0] * p.kernel[1]
    if o.norm is not None:
        assert p.act is not None
        pre = o.norm.pre(o.x)
        leaf = pre.value.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf, p.act).sum(), leaf)
        dx = slope * da
        curved = p.act in ("sigmoid", "tanh", "silu")
        steep = slope.abs() + (0.1 + pre.scale if curved else 0.0)
        dx_scale, dx_stored = da_scale * steep, da_stored * steep
        xhat = (o.x.double() - column(o.norm.mean)) * column(o.norm.rstd)
        xhat_scale = (o.x.double().abs() + column(o.norm.mean).abs()) * column(o.norm.rstd)

        def per_channel(value: Tensor, scale: Tensor, stored: Tensor, factor: Tensor, magnitude: Tensor) -> Reference:
            sums = ((value * factor).sum((0, 2, 3)), (scale * magnitude).sum((0, 2, 3)))
            return Reference(*sums, max(length, p.n * p.h * p.w), (stored * magnitude).sum((0, 2, 3)))

        one = torch.ones(())
        result["grad_weight"] = per_channel(dx, dx_scale, dx_stored, xhat, xhat_scale)
        result["grad_bias"] = per_channel(dx, dx_scale, dx_stored, one.double(), one.double())
    else:
        dx, dx_scale, dx_stored = da, da_scale, da_stored
    result["grad_x"] = Reference(dx, dx_scale, length, dx_stored)

    dw = _transposed(p, dz.value, w, True, a.value)
    dw_scale = _transposed(p, dz.scale, w, True, a.scale)
    both = _transposed(p, dz.value.abs(), w, True, a.value.abs())
    roundings = (o.norm is not None) + (o.z_norm is not None)
    result["grad_conv_weight"] = Reference(dw, dw_scale, count, roundings * both)
    return result


def normed(norm: Norm | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else (norm.mean, norm.rstd, norm.weight, norm.bias)


def act_number(p: Problem) -> int:
    return testing.ACTIVATIONS.index(p.act or "identity")


def forward(
    p: Problem, o: Operands, *, training: bool = True, eps: float = 1e-5, **running: Tensor
) -> tuple[Tensor, ...]:
    """z, mean, rstd and var of the convolution's output."""
    result: tuple[Tensor, ...] = op("conv2d_norm_forward")(
        o.x,
        *normed(o.norm),
        act_number(p),
        SLOPE,
        o.weight,
        *p.geometry,
        running.get("running_mean"),
        running.get("running_var"),
        training,
        eps,
    )
    return result


def gradient_arguments(p: Problem, o: Operands) -> tuple[Any, ...]:
    """What the two backward operators have in common, up to the input's activation."""
    z_mean, z_rstd, z_weight, _ = normed(o.z_norm)
    gradient = (o.dy, packed_bits(o.mask), o.z, z_mean, z_rstd, z_weight, o.grad_z_weight, o.grad_z_bias)
    return (*gradient, p.output_norm == "train", o.weight, o.x, *normed(o.norm), act_number(p), SLOPE)


def backward_data(p: Problem, o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """dx and the gradients of the input's batch norm."""
    skips = (o.skip, packed_bits(o.skip_mask))
    result: tuple[Tensor, Tensor, Tensor] = op("conv2d_norm_backward_data")(
        *gradient_arguments(p, o), *skips, *p.geometry
    )
    return result


def backward_weight(p: Problem, o: Operands) -> Tensor:
    result: Tensor = op("conv2d_norm_backward_weight")(*gradient_arguments(p, o), *p.geometry)[0]
    return result


def backward(p: Problem, o: Operands, bias: bool = False) -> tuple[Tensor, ...]:
    """All gradients by one operator: of x and its batch norm, of the weight and of a bias."""
    skips = (o.skip, packed_bits(o.skip_mask))
    result: tuple[Tensor, ...] = op("conv2d_norm_backward")(*gradient_arguments(p, o), *skips, *p.geometry, bias)
    return result


def run(p: Problem, o: Operands) -> dict[str, Tensor]:
    """All three operators, under the names of :func:`reference`, and `rstd`."""
    z, mean, rstd, var = forward(p, o)
    grad_x, grad_weight, grad_bias = backward_data(p, o)
    result = {"z": z, "mean": mean, "rstd": rstd, "var": var, "grad_x": grad_x}
    if o.norm is not None:
        result |= {"grad_weight": grad_weight, "grad_bias": grad_bias}
    return result | {"grad_conv_weight": backward_weight(p, o)}


def check(p: Problem) -> None:
    """Compares all three operators with fp64."""
    o = draw(p)
    got, expected = run(p, o), reference(p, o)
    rstd = got.pop("rstd")
    try:
        assert got.keys() == expected.keys()
        for name, value in got.items():
            testing.assert_close(value, expected[name], compute_dtype=p.dtype, name=name)
        assert got["z"].dtype == got["grad_x"].dtype == p.dtype
        assert got["grad_conv_weight"].dtype == p.weight_dtype
        for image in (got["z"], got["grad_x"]):
            assert image.is_contiguous(memory_format=torch.channels_last)
        exact = (got["var"].double() + 1e-5).rsqrt()
        testing.assert_close(rstd, exact, scale=exact, name="rstd")
    except AssertionError as error:
        raise AssertionError(f"{p}\n{error}") from None


def variants(p: Problem, dtype: torch.dtype, index: int) -> Problem:
    """`p` with one of all combinations of norms, activations, masks and skips; `index` walks through them."""
    act = (None, *ACTIVATIONS)[index % 7]
    return replace(
        p,
        dtype=dtype,
        act=act,
        affine=index % 5 != 0,
        output_norm=(None, "train", "eval")[index % 3],
        mask=index % 4 in (1, 2),
        skip=(None, "plain", "masked")[index // 7 % 3],
        weight_layout=("NHWC", "NCHW")[index // 3 % 2],
        float_weight=dtype in (torch.bfloat16, torch.float16) and index % 2 == 0,
        seed=index,
    )
