"""Exact references and the one place for tolerances, for this package's tests and for users' own checks.

A reference is computed in fp64 from the very numbers the tested operator got, so inputs are drawn to be exactly
representable in the tested dtype (:func:`draw`) and no input rounding has to be forgiven. What is left are the
operator's own rounding errors, and :func:`assert_close` allows exactly these:

    |actual - reference| <= u(result) * |reference|  +  u(dtype) * stored  +  (8 + sqrt(n)) * u(accumulator) * scale

- ``u`` is the unit roundoff, half of machine epsilon: the error of rounding one number to its dtype.
- ``stored`` is the effect of intermediates that had to be written in the activations' dtype, such as what a convolution
  reads; most operators have none.
- the accumulator is fp32, or fp64 for fp64 inputs. ``scale`` is the sum of the absolute values of the terms that make
  the result, so cancellation is forgiven and nothing else is.
- ``n`` is the length of the reduction. A running sum of n like-signed terms of total S errs by a random walk of
  standard deviation u * S * sqrt(n) / 3, so sqrt(n) is three of them; chunked or pairwise sums, which the kernels use,
  stay far below. The 8 counts the roundings of the element-wise formula and of one transcendental function.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import _extension
from fused_resnet.nn.guard import stock
from fused_resnet.timing import BatchNormCalls as BatchNormCalls
from fused_resnet.timing import Comparison as Comparison
from fused_resnet.timing import Spread as Spread
from fused_resnet.timing import count_batch_norms as count_batch_norms
from fused_resnet.timing import interleave as interleave
from fused_resnet.timing import last_level_cache_bytes as last_level_cache_bytes
from fused_resnet.timing import machine as machine
from fused_resnet.timing import training_step as training_step

ACTIVATIONS = ("identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu")
_ELEMENTWISE_ROUNDINGS = 8.0
_ISA_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding a number to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the package computes on activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulation_tolerance(dtype: torch.dtype, reduction_length: int = 1) -> float:
    """Allowed error of a sum of ``reduction_length`` terms, as a fraction of the sum of their absolute values."""
    return (_ELEMENTWISE_ROUNDINGS + math.sqrt(reduction_length)) * unit_roundoff(accumulator(dtype))


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    channels_last: bool = False,
) -> Tensor:
    """Normally distributed numbers exactly representable in ``dtype``: rounded once, before anyone sees them."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(std).add_(mean).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


@dataclass(frozen=True)
class Reference:
    """An fp64 result and the magnitudes that bound the rounding error of computing it (see the module's docstring)."""

    value: Tensor
    scale: Tensor
    reduction_length: int = 1
    stored: Tensor | float = 0.0


def assert_close(
    actual: Tensor,
    reference: Tensor | Reference,
    *,
    reduction_length: int | None = None,
    scale: Tensor | float | None = None,
    roundings: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """Raises AssertionError unless ``actual`` is as near to ``reference`` as its arithmetic allows.

    Args:
        actual: what the operator returned, any floating dtype.
        reference: the fp64 result, alone or with its magnitudes.
        reduction_length: terms in the longest sum behind one element; default: the reference's, else 1.
        scale: sum of the absolute values of these terms; default: the reference's, else its largest absolute value.
        roundings: how many times the value was rounded to ``actual.dtype`` on its way; a fused operator rounds once.
        compute_dtype: dtype of the activations when ``actual`` is something else (statistics, parameter gradients).
        name: what the message calls ``actual``.

    NaN must meet NaN, an infinity the same infinity.
    """
    if not isinstance(reference, Reference):
        finite = reference.detach().double().abs().nan_to_num(0.0, 0.0, 0.0)
        reference = Reference(reference, finite.amax() if finite.numel() else finite.sum())
    expected = reference.value.detach().double()
    got = actual.detach().double()
    if got.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if got.numel() == 0:
        return
    length = reference.reduction_length if reduction_length is None else reduction_length
    terms = reference.scale if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    dtype = compute_dtype or actual.dtype
    allowed = roundings * (unit_roundoff(actual.dtype) * expected.abs() + unit_roundoff(dtype) * reference.stored)
    allowed = allowed + accumulation_tolerance(dtype, length) * terms
    info = torch.finfo(actual.dtype)
    allowed = allowed + info.tiny * info.eps  # half a step among the denormals, and the rounding of this line
    error = (got - expected).abs()
    # Rounding to a narrow dtype may overflow where the exact value lies just beyond its range.
    expected_narrow = expected.to(actual.dtype).double()
    same = (got == expected_narrow) | (got.isnan() & expected.isnan())
    bad = ~(same | (error <= allowed))
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        excess = torch.where(bad, error / allowed, 0.0).nan_to_num(math.inf)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements differ; first at {where}: got {got[where].item()!r}, "
            f"expected {expected[where].item()!r}; worst at {worst}: got {got[worst].item()!r}, expected "
            f"{expected[worst].item()!r}, {excess[worst].item():.3g} times the allowed error"
        )


def activation(x: Tensor, act: str, *, act_weight: Tensor | None = None, negative_slope: float = 0.01) -> Tensor:
    """The activation called ``act`` by its plain formula; ``act_weight`` (C,) is prelu's slope."""
    if act == "identity":
        return x
    if act == "relu":
        return F.relu(x)
    if act == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if act == "prelu":
        if act_weight is None:
            raise ValueError("activation: act='prelu' needs act_weight, got None")
        return F.prelu(x, act_weight)
    if act == "sigmoid":
        return torch.sigmoid(x)
    if act == "tanh":
        return torch.tanh(x)
    if act == "silu":
        return F.silu(x)
    raise ValueError(f"activation: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


@dataclass(frozen=True)
class Norm:
    """One batch normalisation's operands, each (C,) or None. Without running statistics the batch's are used."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def batch_statistics(self) -> bool:
        return self.training or self.running_mean is None


def _column(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)


class _Branch:
    """One fp64 batch normalisation: its values for autograd and the magnitudes of its terms."""

    def __init__(self, x: Tensor, norm: Norm) -> None:
        self.norm = norm
        self.x = x.detach().double().requires_grad_()
        self.weight = None if norm.weight is None else norm.weight.detach().double().requires_grad_()
        self.bias = None if norm.bias is None else norm.bias.detach().double().requires_grad_()
        self.count = x.numel() // max(x.shape[1], 1)
        if norm.batch_statistics:
            self.mean = self.x.mean((0, 2, 3))
            self.var = (self.x - _column(self.mean)).square().mean((0, 2, 3))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            self.mean, self.var = norm.running_mean.double(), norm.running_var.double()
        rstd = (self.var + norm.eps).rsqrt()
        self.out = (self.x - _column(self.mean)) * _column(rstd)
        if self.weight is not None:
            self.out = self.out * _column(self.weight)
        if self.bias is not None:
            self.out = self.out + _column(self.bias)
        ones = torch.ones_like(rstd)
        self.gain = _column((rstd * (ones if self.weight is None else self.weight.abs())).detach())
        mean_scale = self.mean.abs() + self.var.sqrt() if norm.batch_statistics else self.mean.abs()
        self.xhat_scale = ((self.x.abs() + _column(mean_scale)) * _column(rstd)).detach()
        bias_scale = 0.0 if self.bias is None else _column(self.bias.abs().detach())
        self.scale = self.xhat_scale * _column(ones if self.weight is None else self.weight.abs().detach()) + bias_scale

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.x, self.weight, self.bias) if leaf is not None]

    def statistics(self) -> dict[str, Reference]:
        out: dict[str, Reference] = {}
        if not self.norm.batch_statistics:
            return out
        mean, var, count = self.mean.detach(), self.var.detach(), self.count
        out["mean"] = Reference(mean, mean.abs() + var.sqrt(), count)
        out["var"] = Reference(var, var, count)
        if self.norm.running_mean is not None and self.norm.running_var is not None:
            momentum = self.norm.momentum
            old_mean, old_var = self.norm.running_mean.double(), self.norm.running_var.double()
            new_var = var * (count / max(count - 1, 1))
            terms_mean = abs(1 - momentum) * old_mean.abs() + abs(momentum) * (mean.abs() + var.sqrt())
            terms_var = abs(1 - momentum) * old_var.abs() + abs(momentum) * new_var
            out["running_mean"] = Reference((1 - momentum) * old_mean + momentum * mean, terms_mean, count)
            out["running_var"] = Reference((1 - momentum) * old_var + momentum * new_var, terms_var, count)
        return out

    def gradients(self, grads: dict[int, Tensor], g_scale: Tensor, g_rounded: Tensor) -> dict[str, Reference]:
        """``g_scale``: magnitude of the terms of g, the gradient after the activation; ``g_rounded``: what of it was
        stored in the activations' dtype on the way."""

        def flow(g: Tensor) -> Tensor:
            if not self.norm.batch_statistics:
                return self.gain * g
            through_var = self.xhat_scale * (g * self.xhat_scale).mean((0, 2, 3), keepdim=True)
            return self.gain * (g + g.mean((0, 2, 3), keepdim=True) + through_var)

        dx = grads[id(self.x)]
        out = {"grad_x": Reference(dx, flow(g_scale), self.count, flow(g_rounded))}
        if self.weight is not None:
            terms = (g_scale * self.xhat_scale).sum((0, 2, 3))
            stored = (g_rounded * self.xhat_scale).sum((0, 2, 3))
            value = grads[id(self.weight)]
            out["grad_weight"] = Reference(value, terms, self.count, stored)
        if self.bias is not None:
            value = grads[id(self.bias)]
            stored = g_rounded.sum((0, 2, 3))
            out["grad_bias"] = Reference(value, g_scale.sum((0, 2, 3)), self.count, stored)
        return out


def reference_batch_norm_act(
    x: Tensor,
    norm: Norm,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: str = "relu",
    act_weight: Tensor | None = None,
    negative_slope: float = 0.01,
    then: Callable[[Tensor], Tensor] | None = None,
    then_weights: tuple[Tensor, ...] = (),
    then_length: int = 1,
    grad_output: Tensor | None = None,
) -> dict[str, Reference]:
    """``then(act(norm(x) [+ residual | + residual_norm(residual)]))`` and its gradients in fp64, by autograd.

    Args:
        x: (N, C, H, W), any floating dtype and layout.
        norm: the batch normalisation of x.
        residual: like x, or None.
        residual_norm: batch normalisation of the residual, or None to add it as it is.
        act, act_weight, negative_slope: the activation.
        then: what follows in the same operator (a pooling, a convolution), called with the activation and
            ``then_weights``; it must be linear or a maximum.
        then_weights: its parameters, differentiated too.
        then_length: terms of one of its sums.
        grad_output: the gradient to propagate; None computes the forward only.

    Returns:
        ``y pre mean var running_mean running_var grad_x grad_weight grad_bias grad_residual grad_residual_weight
        grad_residual_bias grad_act_weight grad_then_<i>``, as far as they exist.
    """
    main = _Branch(x, norm)
    other = None if residual is None or residual_norm is None else _Branch(residual, residual_norm)
    plain = residual.detach().double().requires_grad_() if residual is not None and other is None else None
    slope = None if act_weight is None else act_weight.detach().double().requires_grad_()
    weights = tuple(w.detach().double().requires_grad_() for w in then_weights)

    pre, pre_scale = main.out, main.scale
    if other is not None:
        pre, pre_scale = pre + other.out, pre_scale + other.scale
    elif plain is not None:
        pre, pre_scale = pre + plain, pre_scale + plain.detach().abs()
    a = activation(pre, act, act_weight=slope, negative_slope=negative_slope)
    y = a if then is None else then(a, *weights)

    magnitude_in = (pre_scale + a.detach().abs()).requires_grad_()
    magnitude_weights = tuple(w.detach().abs().requires_grad_() for w in weights)
    y_scale = magnitude_in if then is None else then(magnitude_in, *magnitude_weights)
    # A pooling stores nothing in between; a convolution reads the activation rounded to its dtype.
    stored = y_scale.detach() if weights else 0.0
    result = {
        "pre": Reference(pre.detach(), pre_scale, main.count),
        "y": Reference(y.detach(), y_scale.detach(), max(main.count, then_length), stored),
        **main.statistics(),
    }
    if other is not None:
        result.update({f"residual_{key}": value for key, value in other.statistics().items()})
    if grad_output is None:
        return result

    leaves = main.leaves() + ([] if other is None else other.leaves())
    leaves += [leaf for leaf in (plain, slope, *weights) if leaf is not None]
    dy = grad_output.detach().double()
    found = torch.autograd.grad(y, [*leaves, a], dy, allow_unused=True, retain_graph=True)
    grads = {
        id(leaf): torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip([*leaves, a], found, strict=True)
    }
    da = grads[id(a)]
    if then is None:
        da_scale = da.abs()
        weight_scales: tuple[Tensor, ...] = ()
    elif not weights:  # a maximum routes |dy| by the values, not by their magnitudes
        da_scale, weight_scales = torch.autograd.grad(y, a, dy.abs())[0], ()
    else:
        da_scale, *rest = torch.autograd.grad(y_scale, [magnitude_in, *magnitude_weights], dy.abs())
        weight_scales = tuple(rest)
    da_rounded = da_scale if weights else torch.zeros_like(da)
    steepest = max(1.1, abs(negative_slope), 0.0 if slope is None or not slope.numel() else float(slope.abs().max()))
    curved = act in ("sigmoid", "tanh", "silu")  # there an error of pre is an error of act'(pre)
    g_scale = da_scale * (steepest + (pre_scale if curved else 0.0))
    g_rounded = da_rounded * steepest

    result.update(main.gradients(grads, g_scale, g_rounded))
    if other is not None:
        for key, reference in other.gradients(grads, g_scale, g_rounded).items():
            result["grad_residual" if key == "grad_x" else key.replace("grad_", "grad_residual_")] = reference
    elif plain is not None:
        dr = grads[id(plain)]
        result["grad_residual"] = Reference(dr, g_scale, main.count, g_rounded)
    if slope is not None:
        value = grads[id(slope)]
        dims = (0, 2, 3)
        terms, stored_terms = (da_scale * pre_scale).sum(dims), (da_rounded * pre_scale).sum(dims)
        if slope.numel() == 1:
            terms, stored_terms = terms.sum(0, keepdim=True), stored_terms.sum(0, keepdim=True)
        length = pre.numel() // slope.numel() if slope.numel() else 1
        result["grad_act_weight"] = Reference(value, terms, length, stored_terms)
    for i, (weight, terms) in enumerate(zip(weights, weight_scales, strict=True)):
        value = grads[id(weight)]
        result[f"grad_then_{i}"] = Reference(value, terms, main.count, terms)
    return result


def avoid_kinks(x: Tensor, pre: Callable[[Tensor], Reference], *, dtype: torch.dtype) -> Tensor:
    """Moves elements of ``x`` whose activation input lies within rounding error of 0, where a derivative jumps.

    ``pre`` maps x to its fp64 activation input. Returns a tensor of x's dtype and layout.
    """
    x = x.clone(memory_format=torch.preserve_format)
    for _ in range(20):
        reference = pre(x)
        margin = 4 * accumulation_tolerance(dtype, reference.reduction_length) * reference.scale
        near = reference.value.abs() <= margin
        if not near.any():
            return x
        step = torch.full_like(x, 0.0625) + x.abs() * 0.0625
        x = torch.where(near, x + step, x)
    raise RuntimeError("avoid_kinks: 20 rounds left elements at a kink; is a channel constant?")


def isa_levels() -> list[str]:
    """The instruction sets this build has kernels for and this host runs, from scalar up; empty on the stock path."""
    if not _extension.available():
        return []
    detected = _ISA_NAMES.index(_extension.extension().detected_isa())
    built = _extension.build_info()["cpu_isas_built"] or _ISA_NAMES
    return [name for name in _ISA_NAMES[: detected + 1] if name in built]


@contextmanager
def isa_cap(level: str) -> Iterator[None]:
    """Runs the body with kernels no wider than ``level``, then restores the former cap."""
    extension = _extension.extension()
    before = extension.current_isa()
    extension.set_isa_cap(level)
    try:
        yield
    finally:
        extension.set_isa_cap(before)


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode, changed in place: batch norms that all do something and keep the size of activations.

    Statistics are those of random images; weights and biases are random. The last batch norm of every block is small,
    as in trained networks: else a rounding error grows from block to block, and bfloat16 could not be verified.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    for block in model.modules():
        norms = [child for child in block.children() if isinstance(child, nn.BatchNorm2d)]
        if len(norms) > 1:
            nn.init.uniform_(norms[-1].weight, 0.1, 0.3)
    with torch.no_grad(), stock():
        model(torch.randn(8, 3, 64, 64))
    return model.eval()
