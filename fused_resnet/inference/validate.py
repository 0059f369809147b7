"""Whether a graph that comes from elsewhere makes sense: everything that its steps name is there and has their shape.

How many channels a value has is followed as far as the steps tell it; what stands behind a stock operator is checked by
PyTorch and by the plan when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.inference import graph as g
from fused_resnet.inference.allowed_operators import check_operator
from fused_resnet.inference.operators import decode_constant
from fused_resnet.ops._activation import ACTIVATIONS

_LARGEST_WINDOW = 1 << 16  # kernel, stride, padding, dilation
_DEEPEST = 16  # lists in lists, of an argument


@dataclass(frozen=True)
class _Value:
    """What is known of a value; None: nothing."""

    rank: int | None = None
    channels: int | None = None


def validate(graph: g.Graph) -> None:
    """
    Raises:
        ValueError: naming the step, what was expected and what it has.
    """
    _expect(graph.channels >= 1, "the graph's channels", "at least 1", graph.channels)
    _expect(graph.batch is None or graph.batch >= 1, "the graph's batch", "none or at least 1", graph.batch)
    extent = graph.extent
    _expect(extent is None or min(extent) >= 1, "the graph's extent", "none or at least 1 x 1", extent)
    values = {graph.input: _Value(4, graph.channels)}
    for index, step in enumerate(graph.steps):
        try:
            result = _Check(graph, step, values).result()
        except ValueError as error:
            raise ValueError(f"step {index} ({type(step).__name__} {step.name!r}): {error}") from None
        values[step.output] = result
    for value in graph.outputs:
        _expect(value in values, "the graph's outputs", "values that steps write", value)
    count, structure = len(graph.outputs), graph.structure
    _expect(count >= 1, "the graph's outputs", "at least one", count)
    if structure is None or isinstance(structure, tuple):
        wanted = 1 if structure is None else len(set(structure))
        _expect(wanted == count, "the graph's outputs", f"{wanted}, as its structure has", count)


class _Check:
    """One step, and the values before it."""

    def __init__(self, graph: g.Graph, step: g.Step, values: dict[int, _Value]) -> None:
        self.tensors = graph.tensors
        self.step = step
        _expect(step.output not in values, "output", "a value that no other step writes", step.output)
        for value in step.inputs:
            _expect(value in values, "inputs", "values that were written before", value)
        self.inputs = [values[value] for value in step.inputs]

    def result(self) -> _Value:
        """What the step makes."""
        step = self.step
        if isinstance(step, g.Conv):
            return self.conv(step)
        if isinstance(step, g.Linear):
            return self.linear(step)
        if isinstance(step, g.Affine):
            return self.affine(step)
        if isinstance(step, g.Add):
            self.count(2)
            return self.acted(step.act, self.sum())
        if isinstance(step, g.Act):
            self.count(1)
            return self.acted(step.act, self.inputs[0])
        if isinstance(step, g.Stock):
            self.stock(step)
            return _Value()
        self.count(1)
        image = self.image()
        if isinstance(step, g.MaxPool | g.AvgPool):
            self.window("kernel", step.kernel, 1)
            self.window("stride", step.stride, 1)
            self.window("padding", step.padding, 0)
            if isinstance(step, g.MaxPool):
                self.window("dilation", step.dilation, 1)
        return _Value(2) if isinstance(step, g.Flatten) else image

    def conv(self, step: g.Conv) -> _Value:
        self.count(1, 2)
        image, weight = self.image(), self.floats("weight", step.weight, 4)
        _expect(step.groups >= 1, "groups", "at least 1", step.groups)
        channels = weight.shape[1] * step.groups
        ok = weight.numel() > 0 and weight.shape[0] % step.groups == 0 and image.channels in (None, channels)
        _expect(
            ok, "weight", f"one for {image.channels or 'some'} channels in {step.groups} groups", tuple(weight.shape)
        )
        self.floats("bias", step.bias, 1, weight.shape[0])
        self.window("stride", step.stride, 1)
        self.window("padding", step.padding, 0)
        self.window("dilation", step.dilation, 1)
        _expect((step.scale is None) == (step.shift is None), "scale and shift", "both or neither", step.scale)
        self.floats("scale", step.scale, 1, channels)
        self.floats("shift", step.shift, 1, channels)
        _expect(step.scale is not None or step.pre == g.IDENTITY, "pre", "none without a scale", step.pre.kind)
        self.acted(step.pre, _Value(4, channels))
        result = _Value(4, weight.shape[0])
        if len(self.inputs) == 2:
            self.same(self.inputs[1], result)
        return self.acted(step.act, result)

    def linear(self, step: g.Linear) -> _Value:
        self.count(1)
        given, weight = self.inputs[0], self.floats("weight", step.weight, 2)
        ok = given.rank in (None, 2) and given.channels in (None, weight.shape[1]) and weight.numel() > 0
        _expect(ok, "weight", f"one for {given}", tuple(weight.shape))
        self.floats("bias", step.bias, 1, weight.shape[0])
        return self.acted(step.act, _Value(2, weight.shape[0]))

    def affine(self, step: g.Affine) -> _Value:
        self.count(1, 2)
        channels = self.floats("scale", step.scale, 1, self.inputs[0].channels).shape[0]
        self.floats("shift", step.shift, 1, channels)
        result = self.sum() if len(self.inputs) == 2 else self.inputs[0]
        return self.acted(step.act, _Value(result.rank, channels))

    def stock(self, step: g.Stock) -> None:
        check_operator(step.target, step.args, step.kwargs)
        _expect(step.index is None or 0 <= step.index < 64, "index", "none or a small number", step.index)
        for value in _leaves((*step.args, *step.kwargs.values())):
            if isinstance(value, g.Reference) and isinstance(value.to, str):
                self.tensor("args", value.to)
            elif isinstance(value, g.Reference):
                _expect(value.to in step.inputs, "args", "references to the step's inputs", value.to)
            elif isinstance(value, str):
                decode_constant(value, torch.device("cpu"))

    def count(self, *allowed: int) -> None:
        _expect(len(self.inputs) in allowed, "inputs", " or ".join(map(str, allowed)), len(self.inputs))

    def image(self) -> _Value:
        _expect(self.inputs[0].rank in (None, 4), "inputs", "images", self.inputs[0])
        return self.inputs[0]

    def same(self, first: _Value, second: _Value) -> None:
        ranks = None in (first.rank, second.rank) or first.rank == second.rank
        channels = None in (first.channels, second.channels) or first.channels == second.channels
        _expect(ranks and channels, "inputs", f"another like {first}", second)

    def sum(self) -> _Value:
        first, second = self.inputs
        self.same(first, second)
        return _Value(first.rank or second.rank, first.channels or second.channels)

    def acted(self, act: g.Activation, value: _Value) -> _Value:
        _expect(act.kind in ACTIVATIONS, "act", f"one of {', '.join(ACTIVATIONS)}", act.kind)
        _expect((act.kind == "prelu") == (act.slope is not None), "act", "a slope with prelu and only then", act.slope)
        slope = self.floats("act.slope", act.slope, 1)
        if slope is not None and value.channels is not None:
            _expect(slope.numel() in (1, value.channels), "act.slope", f"1 or {value.channels} elements", slope.numel())
        return value

    def tensor(self, what: str, name: str) -> Tensor:
        _expect(name in self.tensors, what, "a tensor that the graph has", name)
        return self.tensors[name]

    def floats(self, what: str, name: str | None, rank: int, length: int | None = None) -> Any:
        """A tensor of floating-point numbers of this rank, and first extent; None where the step names none."""
        if name is None:
            return None
        tensor = self.tensor(what, name)
        ok = tensor.dim() == rank and length in (None, tensor.shape[0]) and tensor.is_floating_point()
        shape = f"({length}, ...)" if length is not None else f"{rank} dimensions"
        _expect(ok, what, f"floats of {shape}", f"{name!r}, {tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    def window(self, what: str, pair: g.Pair, least: int) -> None:
        _expect(all(least <= n <= _LARGEST_WINDOW for n in pair), what, f"{least} to {_LARGEST_WINDOW}", pair)


def _leaves(values: Any, depth: int = 0) -> Iterator[Any]:
    _expect(depth <= _DEEPEST, "args", f"at most {_DEEPEST} lists in lists", "more")
    for value in values:
        if isinstance(value, tuple):
            yield from _leaves(value, depth + 1)
        else:
            yield value


def _expect(holds: bool, what: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {got}")
