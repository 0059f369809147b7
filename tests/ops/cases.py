"""One differentiable call with random, exactly representable operands, run on the package and on the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.testing import Norm, Reference

OPS = ("plain", "residual", "dual", "max_pool", "conv")
MODES = ("train", "eval", "train_no_affine", "eval_no_affine", "train_weight_only", "eval_weight_only", "no_statistics")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("NCHW", "NHWC")
KERNEL, CONV_CHANNELS = 3, 5
# cuDNN may compute fp32 convolutions by Winograd's algorithm, which rounds its transforms too.
CUDNN_ROUNDINGS = 64.0


Results = dict[str, Tensor]
Arrange = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "NHWC"
    act: str = "relu"
    mode: str = "train"
    narrow_parameters: bool = False  # parameters of the activations' dtype instead of fp32
    mean: float = 0.25
    std: float = 1.0
    seed: int = 0

    @property
    def training(self) -> bool:
        return self.mode in ("train", "train_no_affine", "train_weight_only", "no_statistics")

    @property
    def channels_last(self) -> bool:
        return self.layout == "NHWC"

    @property
    def parameter_dtype(self) -> torch.dtype:
        return self.dtype if self.narrow_parameters else testing.accumulator(self.dtype)


@dataclass
class Operands:
    case: Case
    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    act_weight: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    grad_output: Tensor

    def to(self, device: torch.device | str) -> Operands:
        """The same numbers on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, Norm):
                return replace(value, **{key: move(field) for key, field in vars(value).items()})
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(self, **{key: move(value) for key, value in vars(self).items()})


def _norm(case: Case, generator: torch.Generator) -> Norm:
    c, dtype = case.shape[1], case.parameter_dtype

    def vector(mean: float, std: float) -> Tensor:
        return testing.draw((c,), dtype, generator=generator, mean=mean, std=std)

    statistics = case.mode != "no_statistics"
    affine, weight_only = not case.mode.endswith("no_affine"), case.mode.endswith("weight_only")
    return Norm(
        running_mean=vector(case.mean, 0.2) if statistics else None,
        running_var=vector(0.0, 0.3).square() + 0.5 if statistics else None,
        weight=vector(0.5, 0.8) if affine else None,
        bias=vector(0.0, 0.5) if affine and not weight_only else None,
        training=case.training,
        momentum=0.3,
        eps=1e-3,
    )


def _output_shape(case: Case) -> tuple[int, int, int, int]:
    n, c, h, w = case.shape
    if case.op == "max_pool":
        return n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return (n, CONV_CHANNELS, h, w) if case.op == "conv" else case.shape


def make(case: Case) -> Operands:
    """Draws the operands, on torch's default device; activation inputs keep clear of where a derivative jumps."""
    with torch.device("cpu"):  # the generator's: every device gets the same numbers
        operands = _draw(case)
    device = torch.get_default_device()
    return operands if device.type == "cpu" else operands.to(device)


def _draw(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(case.seed * 1_000_003 + hash(case.shape) % 1_000_003)

    def draw(shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
        image = len(shape) == 4
        return testing.draw(
            shape, case.dtype, generator=generator, mean=mean, std=std, channels_last=image and case.channels_last
        )

    c = case.shape[1]
    two = case.op in ("residual", "dual")
    operands = Operands(
        case,
        x=draw(case.shape, case.mean, case.std),
        norm=_norm(case, generator),
        residual=draw(case.shape) if two else None,
        residual_norm=_norm(case, generator) if case.op == "dual" else None,
        act_weight=draw((c,), 0.25, 0.2).to(case.parameter_dtype) if case.act == "prelu" else None,
        conv_weight=draw((CONV_CHANNELS, c, KERNEL, KERNEL), 0.0, 0.3) if case.op == "conv" else None,
        conv_bias=draw((CONV_CHANNELS,)) if case.op == "conv" else None,
        grad_output=draw(_output_shape(case), 0.1),
    )
    if case.act in ("relu", "leaky_relu", "prelu") and operands.x.numel():
        operands.x = testing.avoid_kinks(
            operands.x, lambda x: reference(replace_x(operands, x), backward=False)["pre"], dtype=case.dtype
        )
    return operands


def replace_x(operands: Operands, x: Tensor) -> Operands:
    return replace(operands, x=x)


def _conv(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(a, weight, bias, padding=KERNEL // 2)


def _pool(a: Tensor) -> Tensor:
    return F.max_pool2d(a, 3, stride=2, padding=1)


def reference(operands: Operands, *, backward: bool = True) -> dict[str, Reference]:
    """The fp64 results under the names that :func:`run` uses."""
    case = operands.case
    then: Callable[..., Tensor] | None = {"conv": _conv, "max_pool": _pool}.get(case.op)
    weights: tuple[Tensor, ...] = ()
    if operands.conv_weight is not None and operands.conv_bias is not None:
        weights = (operands.conv_weight, operands.conv_bias)
    return testing.reference_batch_norm_act(
        operands.x,
        operands.norm,
        residual=operands.residual,
        residual_norm=operands.residual_norm,
        act=case.act,
        act_weight=operands.act_weight,
        negative_slope=0.1,
        then=then,
        then_weights=weights,
        then_length=case.shape[1] * KERNEL * KERNEL if case.op == "conv" else 1,
        grad_output=operands.grad_output if backward else None,
    )


def _copy(tensor: Tensor | None, requires_grad: bool) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)


def call(operands: Operands, t: dict[str, Tensor | None], ops: Any = None) -> Tensor:
    """One call of the operator on the tensors ``t``, which the names of its Python arguments find."""
    ops = fr.ops if ops is None else ops
    case, norm, other = operands.case, operands.norm, operands.residual_norm
    first = (t["x"], t["running_mean"], t["running_var"], t["weight"], t["bias"])
    options: dict[str, Any] = {
        "training": norm.training,
        "momentum": norm.momentum,
        "eps": norm.eps,
        "act": case.act,
        "negative_slope": 0.1,
        "act_weight": t["act_weight"],
    }
    result: Tensor
    if case.op in ("plain", "residual"):
        result = ops.batch_norm_act(*first, residual=t["residual"], **options)
    elif case.op == "dual":
        assert other is not None
        second = (t["residual_running_mean"], t["residual_running_var"], t["residual_weight"], t["residual_bias"])
        result = ops.dual_batch_norm_act(
            *first,
            t["residual"],
            *second,
            residual_training=other.training,
            residual_momentum=other.momentum,
            residual_eps=other.eps,
            **options,
        )
    elif case.op == "max_pool":
        result = ops.batch_norm_act_max_pool(*first, **options)
    else:
        result = ops.batch_norm_act_conv(*first, t["conv_weight"], t["conv_bias"], padding=KERNEL // 2, **options)
    return result


def run(operands: Operands, *, ops: Any = None, backward: bool = True, arrange: Arrange | None = None) -> Results:
    """Calls the operator on fresh copies; returns y, updated running statistics and every gradient by name.

    ``arrange(name, tensor)`` may return an equal tensor with other strides, for x, residual and grad_output.
    """
    t: dict[str, Tensor | None] = {}
    for prefix, norm in (("", operands.norm), ("residual_", operands.residual_norm)):
        for key in ("running_mean", "running_var", "weight", "bias"):
            value = None if norm is None else getattr(norm, key)
            t[prefix + key] = _copy(value, backward and not key.startswith("running"))
    for key in ("x", "residual", "act_weight", "conv_weight", "conv_bias"):
        value = getattr(operands, key)
        if arrange is not None and value is not None and key in ("x", "residual"):
            t[key] = arrange(key, value).detach().requires_grad_(backward)
        else:
            t[key] = _copy(value, backward)
    y = call(operands, t, ops)
    result = {"y": y.detach()}
    for key in ("running_mean", "running_var", "residual_running_mean", "residual_running_var"):
        value = t[key]
        norm = operands.residual_norm if key.startswith("residual") else operands.norm
        if value is not None and norm is not None and norm.training:
            result[key] = value
    if backward:
        dy = operands.grad_output
        y.backward(dy if arrange is None else arrange("grad_output", dy))
        names = {"conv_weight": "then_0", "conv_bias": "then_1"}
        for key, value in t.items():
            if value is not None and value.requires_grad:
                assert value.grad is not None, f"no gradient for {key}"
                result[f"grad_{names.get(key, key)}"] = value.grad
    return result


def compare(operands: Operands, got: Results, expected: dict[str, Reference], *, roundings: float = 1.0) -> None:
    """Raises AssertionError, naming the case, unless every result is as exact as its arithmetic allows."""
    case = operands.case
    if case.op == "conv" and case.dtype == torch.float32 and got["y"].is_cuda:
        roundings = max(roundings, CUDNN_ROUNDINGS)
    try:
        assert got["y"].dtype == case.dtype, f"y is {got['y'].dtype}"
        assert set(got) == set(expected) - {"pre", "mean", "var", "residual_mean", "residual_var"}
        for key, value in got.items():
            testing.assert_close(value, expected[key], compute_dtype=case.dtype, roundings=roundings, name=key)
    except AssertionError as error:
        raise AssertionError(f"{case}\n{error}") from None


def check(case: Case, *, ops: Any = None, arrange: Arrange | None = None, roundings: float = 1.0) -> None:
    """Runs the case and compares everything with the fp64 reference."""
    operands = make(case)
    compare(operands, run(operands, ops=ops, arrange=arrange), reference(operands), roundings=roundings)


def grid(**axes: tuple[Any, ...]) -> Iterator[Case]:
    """The product of the given axes, for a loop inside a test."""
    cases: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        cases = [{**case, name: value} for case in cases for value in values]
    return (Case(**case) for case in cases)
