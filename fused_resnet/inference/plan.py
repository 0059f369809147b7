"""From a graph and the shape of its input to steps with places in one arena.

Values that live at the same time never share memory; a value's place is free once its last reader has run. Runs of our
own steps go over the batch a few images at a time, see `blocks`. What has no kernel runs as PyTorch's operator, on
views of the arena, between them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.inference import graph as g
from fused_resnet.inference.arena import Lifetime, place
from fused_resnet.inference.blocks import Block, Traffic, blocks
from fused_resnet.inference.interpret import Interpreter
from fused_resnet.inference.weights import Extents, Numerics, Weights, geometry
from fused_resnet.ops import _native
from fused_resnet.ops._activation import ACTIVATIONS

_NOTHING = torch.empty(0, device="cpu")
# What a block of images may take of the last-level cache, which others may share: from 4 to 16 MiB, ResNets of batch 16
# and 64 gained 3 to 7% over the whole batch at once, on a processor with 16 MiB a core.
_CACHE_BYTES = 8 << 20

Shape = tuple[int, ...]
_Where = tuple[int, int]  # a place, and how many blocks of images are there
_Act = tuple[int, float, Tensor | None]


@dataclass(frozen=True)
class Line:
    """One step as `explain()` shows it."""

    step: g.Step
    shape: Shape  # of its output
    flops: int
    native: int | None  # its number in the native plan; None: it runs as PyTorch's


@dataclass(frozen=True)
class _Run:
    """Steps of the native plan, for each of some blocks of images."""

    begin: int
    end: int
    blocks: int


class Plan:
    """What runs for one shape of the input. Only read after it was built, by any number of threads.

    Args:
        graph: what to compute.
        shape: of the images, (N, C, H, W), none of them 0.
        weights: the graph's tensors in the dtype of the computation.
        numerics: which approximations the convolutions may use.
    """

    def __init__(self, graph: g.Graph, shape: Shape, weights: Weights, *, numerics: Numerics) -> None:
        self._graph = graph
        self._weights = weights
        self._dtype = weights.dtype
        self.numerics = numerics
        self._stock = Interpreter(graph, weights.dtype, tensors=weights)
        self._like = _trace(graph, shape, weights.dtype)
        self._root = _roots(graph, self._like)
        self._memory = frozenset(tensor.untyped_storage().data_ptr() for tensor in graph.tensors.values())
        self._outputs = {self._root[value] for value in graph.outputs}
        steps = [step for step in graph.steps if self._computes(step)]
        self._ours = {step.output for step in steps if self._has_kernel(step)}
        outside = [step.output for step in steps if step.output not in self._ours or step.output in self._outputs]
        self._tensor = {graph.input: 0} | {value: i + 1 for i, value in enumerate(outside)}
        self._returned = [value for value in self._outputs if value in self._ours]
        runs = self._runs(steps, shape[0])
        self._block = {steps[i].output: run for run in runs for i in range(run.begin, run.end)}
        self._local = self._locals(steps)
        self._offset = self._place(steps)
        self.native: Any = _native.C.InferencePlan(weights.dtype)
        self._held: list[Tensor] = []  # weights, packed and as they are, which other plans may share
        self.lines: list[Line] = []
        self._parts: list[_Run | g.Step] = []
        count = 0
        for run in runs:
            first = count
            for step in steps[run.begin : run.end]:
                native = None
                if step.output in self._ours:
                    self._add(step)
                    native, count = count, count + 1
                else:
                    self._parts.append(step)
                self.lines.append(Line(step, tuple(self._like[step.output].shape), self._flops(step), native))
            if count > first:
                self._parts.append(_Run(first, count, self._count(run)))
        self._last_read = self._last_readers(steps, runs)

    def arena_bytes(self) -> int:
        """Memory of one call with the present number of threads, without its input and output."""
        size: int = self.native.arena_bytes(torch.get_num_threads())
        return size

    def __call__(self, x: Tensor, seconds: list[float] | None = None) -> list[Tensor]:
        """The graph's outputs in the dtype of the computation; those of four dimensions are channels_last.

        With `seconds`, the time of each of `lines` is appended to it.
        """
        tensors = [_NOTHING] * len(self._tensor)
        tensors[0] = self._enter(x)
        for value in self._returned:
            tensors[self._tensor[value]] = _new(self._like[value])
        arena = _native.C.inference_arena(self.arena_bytes())
        with self._stock.own_precision():
            self._run(tensors, arena, seconds)
        outputs = [tensors[self._tensor[self._root[v]]].reshape(self._like[v].shape) for v in self._graph.outputs]
        return _apart(outputs, x, self._memory)

    def _run(self, tensors: list[Tensor], arena: Tensor, seconds: list[float] | None) -> None:
        for part, read in zip(self._parts, self._last_read, strict=True):
            if isinstance(part, _Run):
                times = self.native.run(arena, tensors, part.begin, part.end, part.blocks, seconds is not None)
                if seconds is not None:
                    seconds += times
            else:
                start = time.perf_counter()
                result = self._stock.evaluate(part, {v: self._read(v, arena, tensors) for v in part.inputs})
                tensors[self._tensor[part.output]] = self._settle(result, arena)
                if seconds is not None:
                    seconds.append(time.perf_counter() - start)
            for number in read:
                tensors[number] = _NOTHING

    def _last_readers(self, steps: list[g.Step], runs: list[Block]) -> list[list[int]]:
        """For each part, the tensors of a call that nobody reads after it."""
        last = {}
        for part, run in enumerate(runs):
            for step in steps[run.begin : run.end]:
                for value in (*step.inputs, step.output):
                    last[self._root[value]] = part
        read: list[list[int]] = [[] for _ in runs]
        for value, number in self._tensor.items():
            if value not in self._outputs and value in last:
                read[last[value]].append(number)
        return read

    def _computes(self, step: g.Step) -> bool:
        """Whether a step has anything to do at run time: numbers are known, and some outputs are their inputs."""
        return isinstance(self._like[step.output], Tensor) and self._root[step.output] == step.output

    def _has_kernel(self, step: g.Step) -> bool:
        like = [self._like[value] for value in (*step.inputs, step.output)]
        if isinstance(step, g.Flatten | g.Stock) or any(t.dtype is not self._dtype for t in like):
            return False
        if isinstance(step, g.Linear):
            return like[0].dim() == 2 and self._format(step) is not None
        if any(t.dim() != 4 for t in like):
            return False
        if any(t.shape != like[-1].shape for t in like[1:]):
            return False  # a sum that broadcasts
        if isinstance(step, g.Add | g.Affine | g.Act) and like[0].shape != like[-1].shape:
            return False
        if isinstance(step, g.Conv):
            return self._format(step) is not None
        return True

    def _format(self, step: g.Conv | g.Linear) -> str | None:
        return self._weights.packed_format(step, self._extents(step.inputs[0]), self.numerics)

    def _extents(self, value: int, block: Block | None = None) -> Extents:
        """Of a block of images, or of all. A linear layer's images are the pixels of one image."""
        n, c, *extent = self._like[value].shape
        images = n if block is None else n // self._count(block)
        if not extent:
            return (1, c, 1, images)
        return (images, c, extent[0], extent[1])

    def _runs(self, steps: list[g.Step], batch: int) -> list[Block]:
        """Each of PyTorch's operators alone, and our own steps between them in blocks of images."""
        ours = [step for step in steps if step.output in self._ours]
        one_batch = all(self._like[value].shape[0] == batch for step in ours for value in (*step.inputs, step.output))
        cache = _CACHE_BYTES if one_batch else 0
        result: list[Block] = []
        begin = 0
        while begin < len(steps):
            end = begin
            while end < len(steps) and steps[end].output in self._ours:
                end += 1
            if end == begin:
                end += 1
            if cache == 0 or steps[begin].output not in self._ours:
                result.append(Block(begin, end, batch))
            else:
                traffic = [self._traffic(step) for step in steps[begin:end]]
                for block in blocks(traffic, batch, cache):
                    result.append(Block(begin + block.begin, begin + block.end, block.images))
            begin = end
        return result

    def _count(self, block: Block) -> int:
        """How many blocks a batch has."""
        batch: int = self._like[self._graph.input].shape[0]
        return batch // block.images

    def _traffic(self, step: g.Step) -> Traffic:
        def size(t: Tensor) -> int:
            return t.numel() * self._dtype.itemsize

        image = sum(size(self._like[value]) // self._like[value].shape[0] for value in (*step.inputs, step.output))
        return Traffic(image, size(self._weights.exact[step.weight]) if isinstance(step, g.Conv | g.Linear) else 0)

    def _locals(self, steps: list[g.Step]) -> set[int]:
        """Values that live within one block of images: their memory is a block's."""
        local = {value for value in self._ours if value not in self._outputs}
        for step in steps:
            for value in step.inputs:
                root = self._root[value]
                if root in local and self._block[root] != self._block[step.output]:
                    local.remove(root)
        return local

    def _place(self, steps: list[g.Step]) -> dict[int, int]:
        """Offsets of what our steps write for others to read.

        A value of the whole batch is alive while its writer and its readers go over the blocks.
        """
        last = {self._root[value]: i for i, step in enumerate(steps) for value in step.inputs}
        buffer: dict[int, int] = {}
        lifetimes: dict[int, Lifetime] = {}
        for i, step in enumerate(steps):
            value = step.output
            if value not in self._ours or value in self._outputs:
                continue
            begin, end, like = i, last.get(value, i), self._like[value]
            size = like.numel() * like.element_size()
            if value in self._local:
                size //= self._count(self._block[value])
            else:
                begin, end = self._block[value].begin, self._block[steps[end].output].end - 1
            reused = self._reused(step, buffer, last, i)
            if reused is not None:
                lifetimes[reused] = Lifetime(lifetimes[reused].begin, end, size)
                buffer[value] = reused
            else:
                lifetimes[value] = Lifetime(begin, end, size)
                buffer[value] = value
        offsets = dict(zip(lifetimes, place(list(lifetimes.values())), strict=True))
        return {value: offsets[first] for value, first in buffer.items()}

    def _reused(self, step: g.Step, buffer: dict[int, int], last: dict[int, int], now: int) -> int | None:
        """The buffer that a convolution writes over: its residual's, where nobody reads it later."""
        if not isinstance(step, g.Conv) or len(step.inputs) < 2:
            return None
        residual, x = self._root[step.inputs[1]], self._root[step.inputs[0]]
        alike = (residual in self._local) == (step.output in self._local)
        return buffer.get(residual) if residual != x and last[residual] == now and alike else None

    def _where(self, value: int, block: Block) -> tuple[int, int]:
        """As the native plan counts: an offset, or below 0 a tensor of the call, and the blocks that are there."""
        root = self._root[value]
        count = 1 if root in self._local else self._count(block)
        return (self._offset[root] if root in self._offset else -1 - self._tensor[root]), count

    def _add(self, step: g.Step) -> None:
        block = self._block[step.output]
        x, y = self._where(step.inputs[0], block), self._where(step.output, block)
        second = self._where(step.inputs[1], block) if len(step.inputs) > 1 else None
        extents = self._extents(step.inputs[0], block)
        window = (x, y, extents, tuple(self._like[step.output].shape[2:]))
        if isinstance(step, g.Conv):
            pre = (self._exact(step.scale), self._exact(step.shift), self._act(step.pre, extents[1]))
            self._add_product(step, (x, second, y, extents), pre)
        elif isinstance(step, g.Linear):
            self._add_product(step, (x, None, y, extents), (None, None, self._act(g.IDENTITY, extents[1])))
        elif isinstance(step, g.MaxPool):
            self.native.window(False, *window, step.kernel, step.stride, step.padding, step.dilation, True)
        elif isinstance(step, g.AvgPool):
            counts = step.count_include_pad
            self.native.window(True, *window, step.kernel, step.stride, step.padding, (1, 1), counts)
        elif isinstance(step, g.GlobalAvgPool):
            self.native.window(True, *window, extents[2:], (1, 1), (0, 0), (1, 1), True)
        elif isinstance(step, g.Affine):
            self.native.affine(
                x, second, y, extents, self._exact(step.scale), self._exact(step.shift), self._act(step.act, extents[1])
            )
        elif isinstance(step, g.Add | g.Act):
            self.native.affine(x, second, y, extents, None, None, self._act(step.act, extents[1]))
        else:
            raise TypeError(f"no kernel for a {type(step).__name__}")

    def _add_product(
        self,
        step: g.Conv | g.Linear,
        operands: tuple[_Where, _Where | None, _Where, Extents],
        pre: tuple[Tensor | None, Tensor | None, _Act],
    ) -> None:
        packed = self._weights.packed(step, operands[-1], self.numerics)
        weight = self._weights.beside_packed(step, operands[-1], self.numerics, packed)
        self._held += [packed, weight]
        act = self._act(step.act, weight.shape[0])
        self.native.conv(*operands, weight, packed, self._exact(step.bias), *geometry(step), act, *pre, self.numerics)

    def _exact(self, name: str | None) -> Tensor | None:
        return None if name is None else self._weights.exact[name]

    def _act(self, act: g.Activation, channels: int) -> _Act:
        slope = self._exact(act.slope)
        if slope is not None and slope.numel() == 1:
            slope = slope.reshape(1).expand(channels)
        return ACTIVATIONS[act.kind], act.negative_slope, slope

    def _flops(self, step: g.Step) -> int:
        if not isinstance(step, g.Conv | g.Linear):
            return 0
        weight = self._weights.exact[step.weight]
        outputs: int = self._like[step.output].numel()
        return 2 * outputs * (weight.numel() // weight.shape[0])

    def _enter(self, x: Tensor) -> Tensor:
        """The images as the first step reads them, copied only where they have to be."""
        dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_neg()
        if x.dtype is self._dtype and dense:
            return x
        return _pooled(self._like[self._graph.input]).copy_(x)

    def _read(self, value: int, arena: Tensor, tensors: list[Tensor]) -> Any:
        like, root = self._like[value], self._root[value]
        if not isinstance(like, Tensor):
            return like
        if root not in self._offset:
            return tensors[self._tensor[root]].reshape(like.shape)
        at = self._offset[root]
        flat = arena[at : at + like.numel() * like.element_size()].view(like.dtype)
        return _nhwc(flat, self._like[root].shape).reshape(like.shape)

    def _settle(self, result: Tensor, arena: Tensor) -> Tensor:
        """What an operator returned, so that it outlives the arena and our steps can read it."""
        if result.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr():
            result = result.clone()
        return result.contiguous(memory_format=torch.channels_last) if result.dim() == 4 else result.contiguous()


def _trace(graph: g.Graph, shape: Shape, dtype: torch.dtype) -> dict[int, Any]:
    """Every value as a tensor without memory, or as the number that it is."""
    interpreter = Interpreter(graph, dtype, "meta")
    values: dict[int, Any] = {graph.input: torch.empty(shape, dtype=dtype, device="meta")}
    for step in graph.steps:
        values[step.output] = interpreter.evaluate(step, values)
    return values


def _roots(graph: g.Graph, like: dict[int, Any]) -> dict[int, int]:
    """The value whose memory each is: pixels of one position lie as their flattened form does."""
    root = {graph.input: graph.input}
    for step in graph.steps:
        same = isinstance(step, g.Flatten) and like[step.inputs[0]].shape[2:].numel() == 1
        root[step.output] = root[step.inputs[0]] if same else step.output
    return root


def _apart(outputs: list[Tensor], x: Tensor, others: frozenset[int]) -> list[Tensor]:
    """Outputs that share no memory with the images, nor with `others`, nor with each other."""
    seen = {x.untyped_storage().data_ptr(), *others}
    result = []
    for y in outputs:
        memory = y.untyped_storage().data_ptr()
        result.append(y.clone() if memory in seen else y)
        seen.add(memory)
    return result


def _nhwc(flat: Tensor, shape: Shape) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _new(like: Tensor) -> Tensor:
    order = torch.channels_last if like.dim() == 4 else torch.contiguous_format
    return torch.empty(like.shape, dtype=like.dtype, memory_format=order, device="cpu")


def _pooled(like: Tensor) -> Tensor:
    memory: Tensor = _native.C.inference_arena(like.numel() * like.element_size())
    return _nhwc(memory.view(like.dtype), tuple(like.shape))
