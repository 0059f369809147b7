"""The batch-norm units that are timed: what each computes, fused and in fast eager PyTorch, and what it must move."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr

SHAPES = Path(__file__).resolve().parent / "shapes"

Function = Callable[..., Tensor]
Norm = Callable[[Tensor, Sequence[Tensor], bool], Tensor]


@dataclass(frozen=True)
class Unit:
    """One row of a shapes file."""

    name: str
    count: int  # how often the model holds it
    channels: int
    height: int
    width: int
    kind: str


def load_units(model: str) -> list[Unit]:
    """The rows of `bench/shapes/<model>.csv`."""
    path = SHAPES / f"{model}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    units = [
        Unit(r["name"], int(r["count"]), int(r["channels"]), int(r["height"]), int(r["width"]), r["kind"]) for r in rows
    ]
    unknown = {unit.kind for unit in units} - set(KINDS)
    if unknown:
        raise SystemExit(f"{path.name}: unknown kind {', '.join(sorted(unknown))}")
    return units


@dataclass(frozen=True)
class Kind:
    """How one kind of unit is computed, and its passes over memory in units of one activation tensor x.

    The minimum of passes for operands larger than the cache: the two reductions of batch norm (statistics forward, two
    sums backward) cannot be had in the pass that needs them, so x is read twice each way. Masks are an eighth of a byte
    per element and are not counted; the winners of the max-pool are a byte per output and are.
    """

    fused: Function
    eager: Function
    residual: bool  # takes a second tensor of x's shape
    dual: bool  # which has its own batch norm
    norm: bool  # has a batch norm at all
    forward_passes: float
    backward_passes: float
    infer_passes: float
    eager_passes: float  # forward and backward, for the reader: what eager PyTorch moves


def _norm(x: Tensor, p: Sequence[Tensor], training: bool) -> Tensor:
    return F.batch_norm(x, p[0], p[1], p[2], p[3], training)


def cudnn_norm(x: Tensor, p: Sequence[Tensor], training: bool) -> Tensor:
    """cuDNN's batch norm by name; PyTorch itself takes it in some layouts and dtypes only."""
    result: Tensor = torch.ops.aten.cudnn_batch_norm(x, p[2], p[3], p[0], p[1], training, 0.1, 1e-5)[0]
    return result


# momentum and eps are the defaults everywhere; `act` are the operators' further options
def _fused_bn(x: Tensor, *p: Tensor, training: bool) -> Tensor:
    mean, var, weight, bias = p
    return fr.ops.batch_norm_act(x, mean, var, weight, bias, training=training, act="identity")


def _fused_bn_act(x: Tensor, *p: Tensor, training: bool, **act: Any) -> Tensor:
    mean, var, weight, bias = p
    return fr.ops.batch_norm_act(x, mean, var, weight, bias, training=training, **act)


def _fused_bn_add_act(x: Tensor, residual: Tensor, *p: Tensor, training: bool, **act: Any) -> Tensor:
    mean, var, weight, bias = p
    return fr.ops.batch_norm_act(x, mean, var, weight, bias, residual=residual, training=training, **act)


def _fused_bn_dual_act(x: Tensor, residual: Tensor, *p: Tensor, training: bool, **act: Any) -> Tensor:
    mean, var, weight, bias, *residual_norm = p
    mean2, var2, weight2, bias2 = residual_norm
    return fr.ops.dual_batch_norm_act(
        x, mean, var, weight, bias, residual, mean2, var2, weight2, bias2, training=training, **act
    )


def _fused_stem_pool(x: Tensor, *p: Tensor, training: bool, **act: Any) -> Tensor:
    mean, var, weight, bias = p
    return fr.ops.batch_norm_act_max_pool(x, mean, var, weight, bias, training=training, **act)


def _fused_add_act(x: Tensor, residual: Tensor, *, training: bool, **act: Any) -> Tensor:  # noqa: ARG001  # one signature for all
    return fr.ops.add_act(x, residual, **act)


# Eager as torchvision writes it, with the in-place add and relu that save it memory and time.
def _eager_bn(x: Tensor, *p: Tensor, training: bool, norm: Norm = _norm) -> Tensor:
    return norm(x, p, training)


def _eager_bn_act(x: Tensor, *p: Tensor, training: bool, norm: Norm = _norm, act: Function = F.relu_) -> Tensor:
    return act(norm(x, p, training))


def _eager_bn_add_act(
    x: Tensor, residual: Tensor, *p: Tensor, training: bool, norm: Norm = _norm, act: Function = F.relu_
) -> Tensor:
    return act(norm(x, p, training).add_(residual))


def _eager_bn_dual_act(
    x: Tensor, residual: Tensor, *p: Tensor, training: bool, norm: Norm = _norm, act: Function = F.relu_
) -> Tensor:
    return act(norm(x, p, training).add_(norm(residual, p[4:], training)))


def _eager_stem_pool(x: Tensor, *p: Tensor, training: bool, norm: Norm = _norm, act: Function = F.relu_) -> Tensor:
    return F.max_pool2d(act(norm(x, p, training)), 3, 2, 1)


def _eager_add_act(x: Tensor, residual: Tensor, *, training: bool, act: Function = F.relu_) -> Tensor:  # noqa: ARG001
    return act(x + residual)


# A column at a time: forward = statistics (reads) + apply (reads, writes); backward = sums + apply.
# bn_act       x | x, y                     dy, x | dy, x, dx
# bn_add_act   x | x, r, y                  dy, x | dy, x, dx, dr
# bn_dual_act  x, r | x, r, y               dy, x, r | dy, x, r, dx, dr
# stem_pool    x | x, y/4 (+ winners)       dy/4, x | dy/4, x, dx (+ winners twice)
# add_act      x, r, y                      dy, y, and one tensor serves as both gradients
KINDS: dict[str, Kind] = {
    "bn": Kind(_fused_bn, _eager_bn, False, False, True, 3, 5, 2, 8),
    "bn_act": Kind(_fused_bn_act, _eager_bn_act, False, False, True, 3, 5, 2, 13),
    "bn_add_act": Kind(_fused_bn_add_act, _eager_bn_add_act, True, False, True, 4, 6, 3, 16),
    "bn_dual_act": Kind(_fused_bn_dual_act, _eager_bn_dual_act, True, True, True, 5, 8, 3, 24),
    "stem_pool": Kind(_fused_stem_pool, _eager_stem_pool, False, False, True, 2.25, 3.5, 1.25, 17.75),
    "add_act": Kind(_fused_add_act, _eager_add_act, True, False, False, 3, 3, 3, 8),
}
WINNERS_PASSES = {"forward": 1, "backward": 2, "train": 3, "infer": 0}  # of one byte per pooled element


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class Case:
    """One unit at one batch, dtype and layout: operands, and the functions to time."""

    def __init__(self, unit: Unit, batch: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.unit, self.kind = unit, KINDS[unit.kind]
        shape = (batch, unit.channels, unit.height, unit.width)

        def activation(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape).to(dtype).to(memory_format=layout)

        # Parameters are fp32 also for bf16 activations: what autocast runs.
        def norm_operands() -> list[Tensor]:
            c = unit.channels
            drawn = [torch.zeros(c), torch.ones(c), torch.rand(c) + 0.5, torch.randn(c) * 0.1]
            return [t.double() for t in drawn] if dtype == torch.float64 else drawn

        self.x = activation(shape)
        self.tensors = [self.x] + ([activation(shape)] if self.kind.residual else [])
        self.norms = norm_operands() if self.kind.norm else []
        self.norms += norm_operands() if self.kind.dual else []
        # Weights and biases, not the running statistics before them.
        learned = [p for index, p in enumerate(self.norms) if index % 4 >= 2]
        self.differentiable = [t.requires_grad_() for t in (*self.tensors, *learned)]
        # Extent and layout of the output from a device that computes nothing: a sanitizer watches no kernel but ours.
        shadows = (t.detach().to("meta") for t in (*self.tensors, *self.norms))
        self.grad_output = torch.randn_like(self.kind.eager(*shadows, training=True), device=self.x.device)

    def call(self, passes: str, function: Function) -> Callable[[], object]:
        """A function without arguments that runs `passes` of `function`; results are fresh and dropped."""
        # Running statistics of its own: a kept graph is void once somebody else writes into them.
        norms = [p.clone() if index % 4 < 2 else p for index, p in enumerate(self.norms)]
        operands = (*self.tensors, *norms)
        if passes == "infer":

            def infer() -> Tensor:
                with torch.inference_mode():
                    return function(*operands, training=False)

            return infer
        if passes == "forward":
            return lambda: function(*operands, training=True)
        if passes == "backward":
            kept = function(*operands, training=True)
            return lambda: torch.autograd.grad(kept, self.differentiable, self.grad_output, retain_graph=True)
        return lambda: torch.autograd.grad(function(*operands, training=True), self.differentiable, self.grad_output)

    def results(self, **act: Any) -> list[Tensor]:
        """Output and gradients of the fused unit."""
        output = self.kind.fused(*self.tensors, *self.norms, training=True, **act)
        return [output.detach(), *torch.autograd.grad(output, self.differentiable, self.grad_output)]

    def reference(self, **act: Any) -> list[Tensor]:
        """The same of eager PyTorch in fp32: bf16 rounded after every step would be further from the truth."""
        output = self.kind.eager(*(_wide(t) for t in self.tensors), *self.norms, training=True, **act)
        return [output.detach(), *torch.autograd.grad(output, self.differentiable, _wide(self.grad_output))]

    def inferred(self) -> tuple[Tensor, Tensor]:
        """Output with fixed statistics, of the fused unit and of eager PyTorch in fp32."""
        with torch.inference_mode():
            fused = self.kind.fused(*self.tensors, *self.norms, training=False)
            return fused, self.kind.eager(*(_wide(t) for t in self.tensors), *self.norms, training=False)

    def tensor_bytes(self) -> int:
        """Bytes of one activation tensor."""
        return self.x.numel() * self.x.element_size()

    def minimum_bytes(self, passes: str) -> float:
        """The least that `passes` must read and write when nothing stays in a cache."""
        kind = self.kind
        count = {
            "forward": kind.forward_passes,
            "backward": kind.backward_passes,
            "train": kind.forward_passes + kind.backward_passes,
            "infer": kind.infer_passes,
        }[passes]
        winners = self.x.numel() // 4 * WINNERS_PASSES[passes] if self.unit.kind == "stem_pool" else 0
        return count * self.tensor_bytes() + winners
