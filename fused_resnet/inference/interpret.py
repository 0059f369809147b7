"""The graph with PyTorch's operators, in any floating dtype and on any device.

In float64 it is the reference; it also runs graphs where the extension does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.inference.graph import (
    IDENTITY,
    Act,
    Activation,
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Reference,
    Step,
    Stock,
)
from fused_resnet.inference.operators import decode_constant, resolve

Output = Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]


def run(graph: Graph, x: Tensor, dtype: torch.dtype = torch.float32) -> Output:
    """`graph` of `x` (N, C, H, W) in `dtype`, on the device of `x`. `Interpreter` keeps what several calls share."""
    return Interpreter(graph, dtype, x.device)(x)


def check_input(graph: Graph, x: Tensor) -> None:
    """
    Raises:
        TypeError, ValueError: `x` is not images that the graph takes.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"inference: expected a tensor (N, {graph.channels}, H, W), got {type(x).__name__}")
    if not x.is_floating_point() or x.layout is not torch.strided:
        raise ValueError(f"inference: expected dense floating-point images, got {x.dtype} ({x.layout})")
    rows, columns = graph.extent or ("H", "W")
    expected = ("N" if graph.batch is None else graph.batch, graph.channels, rows, columns)
    if x.dim() != 4 or any(isinstance(want, int) and want != got for want, got in zip(expected, x.shape, strict=True)):
        shape = ", ".join(map(str, expected))
        raise ValueError(f"inference: expected images of shape ({shape}), got {tuple(x.shape)}")


def structured(graph: Graph, outputs: list[Tensor]) -> Output:
    """The outputs as the model returned them."""
    if graph.structure is None:
        return outputs[0]
    if graph.structure == "list":
        return outputs
    if graph.structure == "tuple":
        return tuple(outputs)
    return dict(zip(graph.structure, outputs, strict=True))


class Interpreter:
    """A graph whose tensors were brought to one dtype and device once.

    Args:
        graph: what to run; its tensors are shared where they have the dtype and device already.
        dtype: in which everything is computed.
        device: on which.
        tensors: the graph's, where somebody has them in this dtype and on this device already.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.graph = graph
        self.dtype = dtype
        self.device = torch.device(device)
        self.own_dtype = _dtype_of(graph)
        self.tensors = tensors or {name: self._placed(tensor) for name, tensor in graph.tensors.items()}
        self.operators = {step.target: resolve(step.target) for step in graph.steps if isinstance(step, Stock)}
        self.last_read = {value: place for place, step in enumerate(graph.steps) for value in step.inputs}

    def __call__(self, x: Tensor) -> Output:
        """`x` (N, C, H, W) of any floating dtype, on any device."""
        check_input(self.graph, x)
        return structured(self.graph, self.compute(self.placed_input(x)))

    def placed_input(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def compute(self, x: Tensor) -> list[Tensor]:
        """The outputs in a row, of an input that is where and what it should be."""
        with self._own_precision():
            values: dict[int, Any] = {self.graph.input: x}
            for place, step in enumerate(self.graph.steps):
                values[step.output] = self.evaluate(step, values)
                for value in step.inputs:
                    if self.last_read[value] == place and value not in self.graph.outputs:
                        values.pop(value, None)
            return [values[value] for value in self.graph.outputs]

    def _own_precision(self) -> AbstractContextManager[Any]:
        """The dtype was chosen: a caller's autocast does not choose another."""
        return nullcontext() if self.device.type == "meta" else torch.autocast(self.device.type, enabled=False)

    def _placed(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        tensor = tensor.to(self.device, self.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def evaluate(self, step: Step, values: Mapping[int, Any]) -> Any:
        """What one step makes of the values that it reads."""
        return _RUN[type(step)](self, step, *[values[value] for value in step.inputs])

    def tensor(self, name: str | None) -> Tensor | None:
        return None if name is None else self.tensors[name]

    def act(self, act: Activation, x: Tensor, *, own: bool = True) -> Tensor:
        """`own`: nobody else reads x, so it may be written."""
        if act.kind == "relu":
            return x.relu_() if own else x.relu()
        if act.kind == "prelu":
            assert act.slope is not None
            return F.prelu(x, self.tensors[act.slope])
        if act.kind == "leaky_relu":
            return F.leaky_relu(x, act.negative_slope, inplace=own)
        return _ACTIVATIONS[act.kind](x)

    def affine(self, x: Tensor, scale: str, shift: str) -> Tensor:
        column = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.tensors[shift].view(column), x, self.tensors[scale].view(column))

    def conv(self, step: Conv, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if step.scale is not None and step.shift is not None:
            x = self.act(step.pre, self.affine(x, step.scale, step.shift))
        weight, bias = self.tensors[step.weight], self.tensor(step.bias)
        geometry = (step.stride, step.padding, step.dilation, step.groups)
        if self._has_fused_conv(step):
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
        y = F.conv2d(x, weight, bias, *geometry)
        return self.act(step.act, y if residual is None else y.add_(residual))

    def _has_fused_conv(self, step: Conv) -> bool:
        return (
            self.device.type == "cuda"
            and step.act.kind == "relu"
            and step.groups == 1
            and self.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and torch.version.hip is None
            and torch.backends.cudnn.is_available()
        )

    def linear(self, step: Linear, x: Tensor) -> Tensor:
        return self.act(step.act, F.linear(x, self.tensors[step.weight], self.tensor(step.bias)))

    def affine_step(self, step: Affine, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.affine(x, step.scale, step.shift)
        return self.act(step.act, y if residual is None else y.add_(residual))

    def add(self, step: Add, x: Tensor, y: Tensor) -> Tensor:
        return self.act(step.act, x + y)

    def activation(self, step: Act, x: Tensor) -> Tensor:
        return self.act(step.act, x, own=False)

    def max_pool(self, step: MaxPool, x: Tensor) -> Tensor:
        return F.max_pool2d(x, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)

    def avg_pool(self, step: AvgPool, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, step.kernel, step.stride, step.padding, step.ceil_mode, step.count_include_pad)

    def global_avg_pool(self, _: GlobalAvgPool, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1)

    def flatten(self, _: Flatten, x: Tensor) -> Tensor:
        return x.flatten(1)

    def stock(self, step: Stock, *inputs: Any) -> Any:
        values = dict(zip(step.inputs, inputs, strict=True))
        args = [self._argument(value, values) for value in step.args]
        kwargs = {key: self._argument(value, values) for key, value in step.kwargs.items()}
        result = self.operators[step.target](*args, **kwargs)
        return result if step.index is None else result[step.index]

    def _argument(self, value: Any, values: dict[int, Any]) -> Any:
        if isinstance(value, Reference):
            return self.tensors[value.to] if isinstance(value.to, str) else values[value.to]
        if isinstance(value, tuple):
            return [self._argument(item, values) for item in value]
        if isinstance(value, str):
            decoded = decode_constant(value, self.device)
            return self.dtype if decoded is self.own_dtype else decoded
        return value


def _dtype_of(graph: Graph) -> torch.dtype:
    """That of the graph's tensors: among the arguments of its operators it stands for the one it is run in."""
    return next((tensor.dtype for tensor in graph.tensors.values() if tensor.is_floating_point()), torch.float32)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    IDENTITY.kind: lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
}
_RUN: dict[type[Step], Callable[..., Any]] = {
    Conv: Interpreter.conv,
    Linear: Interpreter.linear,
    Affine: Interpreter.affine_step,
    Add: Interpreter.add,
    Act: Interpreter.activation,
    MaxPool: Interpreter.max_pool,
    AvgPool: Interpreter.avg_pool,
    GlobalAvgPool: Interpreter.global_avg_pool,
    Flatten: Interpreter.flatten,
    Stock: Interpreter.stock,
}
