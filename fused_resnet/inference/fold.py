"""Fewer steps with the same result: what follows a convolution into its end, what precedes it into its operand.

Every value is written once, so a step may be moved to where a later step stood that reads its result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.inference.graph import IDENTITY, Act, Activation, Add, Affine, Conv, Graph, Linear, Reference, Step


def fold(graph: Graph, dtype: torch.dtype) -> Graph:
    """The graph in fewer steps; what it folds is rounded once, from float64 to `dtype`.

    A tensor that is folded must be read by one step only, as `lower` makes them. The graph given stays as it is.
    """
    folding = _Folding(graph)
    for step in graph.steps:
        folding.add(step)
    steps = _affine_operands([step for step in folding.steps if step is not None], graph.outputs)
    return replace(graph, steps=tuple(steps), tensors=folding.rounded(steps, dtype))


class _Folding:
    """Goes through the steps in order; `steps` has None where one went elsewhere."""

    def __init__(self, graph: Graph) -> None:
        self.tensors = dict(graph.tensors)
        self.gains: dict[str, Tensor] = {}  # factors of the rows of a weight, not yet applied
        self.steps: list[Step | None] = []
        self.place: dict[int, int] = {}  # of the step that writes a value
        self.readers = Counter(value for step in graph.steps for value in step.inputs) + Counter(graph.outputs)

    def add(self, step: Step) -> None:
        if not (
            (isinstance(step, Affine) and self.into_product(step))
            or (isinstance(step, Add) and self.into_residual(step))
            or (isinstance(step, Act) and self.into_end(step))
        ):
            self.append(step)

    def append(self, step: Step) -> None:
        self.place[step.output] = len(self.steps)
        self.steps.append(step)

    def private(self, value: int) -> Step | None:
        """The step that writes a value which only one reads."""
        return self.steps[self.place[value]] if self.readers[value] == 1 and value in self.place else None

    def substitute(self, old: Step, new: Step) -> bool:
        place = self.place.pop(old.output)
        self.steps[place] = new
        self.place[new.output] = place
        return True

    def into_product(self, affine: Affine) -> bool:
        """`(w x + b) * scale + shift`, or an affine after an affine."""
        before = self.private(affine.inputs[0])
        if len(affine.inputs) != 1 or not _is_open(before):
            return False
        scale, shift = self.tensors[affine.scale].double(), self.tensors[affine.shift].double()
        if isinstance(before, Affine):
            self.tensors[affine.scale] = self.tensors[before.scale].double() * scale
            self.tensors[affine.shift] = self.tensors[before.shift].double() * scale + shift
            fused: Step = replace(affine, inputs=before.inputs)
            return self.substitute(before, fused)
        assert isinstance(before, (Conv, Linear))
        gain = self.gains.get(before.weight)
        self.gains[before.weight] = scale if gain is None else gain * scale
        self.tensors[affine.shift] = (
            shift if before.bias is None else self.tensors[before.bias].double() * scale + shift
        )
        return self.substitute(before, replace(before, output=affine.output, bias=affine.shift, act=affine.act))

    def into_residual(self, add: Add) -> bool:
        """The addend must exist before the convolution, so that of the later operand takes it, in the sum's place."""
        first, second = add.inputs
        operands = [(self.place.get(value, -1), value) for value in {first, second}]
        for kind in (Conv, Affine):
            for place, value in sorted(operands, reverse=True):
                step = self.private(value)
                if isinstance(step, kind) and _is_open(step):
                    other = second if value == first else first
                    self.steps[place] = None
                    self.append(replace(step, inputs=(step.inputs[0], other), output=add.output, act=add.act))
                    return True
        return False

    def into_end(self, act: Act) -> bool:
        before = self.private(act.inputs[0])
        if not isinstance(before, (Conv, Linear, Affine, Add)) or before.act != IDENTITY:
            return False
        return self.substitute(before, replace(before, output=act.output, act=act.act))

    def rounded(self, steps: Sequence[Step], dtype: torch.dtype) -> dict[str, Tensor]:
        """Only what is still read; of its own memory, because the model may change later."""
        names = dict.fromkeys(name for step in steps for name in _tensor_names(step))
        return {name: self.finished(name, dtype) for name in names}

    def finished(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor, gain = self.tensors[name], self.gains.get(name)
        if gain is not None:
            tensor = tensor.double() * gain.view(-1, *[1] * (tensor.dim() - 1))
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _is_open(step: Step | None) -> bool:
    """Whether what follows a step can still become its end."""
    return isinstance(step, (Conv, Linear, Affine)) and len(step.inputs) == 1 and step.act == IDENTITY


def _affine_operands(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """Puts an affine into the operand of the convolutions after it, where nothing else reads it."""
    readers: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        for value in step.inputs:
            readers[value].append(step)
    taken = {
        step.output: step
        for step in steps
        if isinstance(step, Affine)
        and len(step.inputs) == 1
        and step.output not in outputs
        and all(_takes_affine(reader, step.output) for reader in readers[step.output])
    }
    return [
        replace(step, inputs=(taken[step.inputs[0]].inputs[0], *step.inputs[1:]), **_operand(taken[step.inputs[0]]))
        if isinstance(step, Conv) and step.inputs[0] in taken
        else step
        for step in steps
        if step.output not in taken
    ]


def _takes_affine(reader: Step, value: int) -> bool:
    return isinstance(reader, Conv) and reader.scale is None and value not in reader.inputs[1:]


def _operand(affine: Affine) -> dict[str, Any]:
    return {"scale": affine.scale, "shift": affine.shift, "pre": affine.act}


def _tensor_names(step: Step) -> Iterator[str]:
    for item in fields(step):
        if item.name not in ("name", "target"):
            yield from _names_in(getattr(step, item.name), item.name in _TENSOR_FIELDS)


_TENSOR_FIELDS = {"weight", "bias", "scale", "shift"}


def _names_in(value: Any, is_tensor: bool) -> Iterator[str]:
    if isinstance(value, str) and is_tensor:
        yield value
    elif isinstance(value, Activation) and value.slope is not None:
        yield value.slope
    elif isinstance(value, Reference) and isinstance(value.to, str):
        yield value.to
    elif isinstance(value, (tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _names_in(item, False)
