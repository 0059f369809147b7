"""The graph on a GPU: PyTorch's operators, recorded once for a shape as a CUDA graph and replayed by one call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_resnet.inference.graph import Graph, Stock
from fused_resnet.inference.interpret import Interpreter, Output, check_input, structured
from fused_resnet.inference.operators import resolve

_WARM_UPS = 3  # libraries choose their algorithms and allocate, which cannot be recorded
_NOT_RECORDABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


class Recording(Protocol):
    """One shape's work: `replay` computes `outputs` from what `input` holds, both in memory of its own."""

    input: Tensor
    outputs: list[Tensor]

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Makes recordings; what stands between `begin` and `end` runs on the device before the next call's."""

    def record(self, interpreter: Interpreter, shape: tuple[int, ...]) -> Recording: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...


class CudaRecording:
    def __init__(self, interpreter: Interpreter, shape: tuple[int, ...], pool: Any) -> None:
        with torch.cuda.device(interpreter.device):
            images = torch.zeros(shape, dtype=interpreter.dtype, device=interpreter.device)
            self.input = interpreter.placed_input(images)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    interpreter.compute(self.input)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = interpreter.compute(self.input)

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """All recordings of a runner share memory: no two run at a time, and what outlives a replay is held by them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.finished = torch.cuda.Event()

    def record(self, interpreter: Interpreter, shape: tuple[int, ...]) -> Recording:
        return CudaRecording(interpreter, shape, self.pool)

    def begin(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.finished)

    def end(self) -> None:
        self.finished.record(torch.cuda.current_stream(self.device))


class CudaRunner:
    """Calls `graph` on a CUDA device; calls of several threads and streams take turns.

    Args:
        graph: what to run. One that waits for the device, or draws random numbers, is not recorded.
        dtype: in which it is computed.
        device: a CUDA device.
        shapes: for how many input shapes recordings are kept, the last used.
        recorder: what records; None: CUDA graphs.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        shapes: int = 4,
        recorder: Recorder | None = None,
    ) -> None:
        self.graph = graph
        self.interpreter = Interpreter(graph, dtype, device)
        self.shapes = shapes
        self._recorder: Recorder = CudaRecorder(self.interpreter.device) if recorder is None else recorder
        self._recordable = is_recordable(graph)
        self._recordings: OrderedDict[tuple[int, ...], Recording] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Output:
        """`x` (N, C, H, W) of any floating dtype, on any device; what is returned is the caller's own."""
        check_input(self.graph, x)
        if not self._recordable:
            return self.interpreter(x)
        with self._lock, torch.no_grad():
            self._recorder.begin()
            recording = self._recording(tuple(x.shape))
            recording.input.copy_(x)
            recording.replay()
            outputs = [output.clone() for output in recording.outputs]
            self._recorder.end()
        return structured(self.graph, outputs)

    def _recording(self, shape: tuple[int, ...]) -> Recording:
        found = self._recordings.get(shape)
        if found is None:
            while len(self._recordings) >= self.shapes:
                self._recordings.popitem(last=False)
            found = self._recordings[shape] = self._recorder.record(self.interpreter, shape)
        self._recordings.move_to_end(shape)
        return found


def is_recordable(graph: Graph) -> bool:
    """Whether the device alone decides what runs: nothing is read back, and every run does the same."""
    operators = [resolve(step.target) for step in graph.steps if isinstance(step, Stock)]
    return not any(_NOT_RECORDABLE.intersection(getattr(operator, "tags", ())) for operator in operators)
