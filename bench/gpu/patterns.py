"""Fused cuDNN graphs around one convolution, built with NVIDIA's Python package `cudnn` (nvidia-cudnn-frontend).

Each builder takes a `Graph` and the operands, describes the graph, and returns what checks it: an output of the graph
and what PyTorch computes for it. A graph that cuDNN has no engine for ends in `cudnn.cudnnGraphNotSupportedError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpu.convolutions import Operands

NOT_INSTALLED = "cudnn frontend not installed"


class UnsupportedError(Exception):
    """The Python package lacks a node that the pattern needs."""


def frontend() -> tuple[ModuleType | None, str | None]:
    """The package, or why there is none."""
    try:
        return importlib.import_module("cudnn"), None
    except ModuleNotFoundError as error:
        if error.name != "cudnn":
            return None, f"cudnn frontend cannot be imported: {error}"
        return None, NOT_INSTALLED
    except (ImportError, OSError, RuntimeError) as error:  # there, but its libraries are not
        return None, f"cudnn frontend cannot be imported: {error}"


def _strides(tensor: Tensor) -> list[int]:
    """Those of channels_last. torch's own leave it open where an extent is 1, and cuDNN would take it for NCHW."""
    _, c, h, w = tensor.shape
    return [c * h * w, 1, c * w, c]


class Graph:
    """One cuDNN graph under construction, and then its plan."""

    def __init__(self, cudnn: ModuleType, handle: Any, dtype: torch.dtype, intermediate: torch.dtype) -> None:
        kinds = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
        self._cudnn, self._handle = cudnn, handle
        self._type = lambda t: getattr(cudnn.data_type, kinds[t])
        self.node: Any = cudnn.pygraph(
            io_data_type=self._type(dtype),
            intermediate_data_type=self._type(intermediate),
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        self._pack: dict[Any, Tensor] = {}
        self._workspace = torch.empty(0)

    def input(self, name: str, tensor: Tensor) -> Any:
        """A graph input that is read from `tensor`."""
        size, kind = list(tensor.size()), self._type(tensor.dtype)
        symbol = self.node.tensor(name=name, dim=size, stride=_strides(tensor), data_type=kind)
        self._pack[symbol] = tensor
        return symbol

    def output(self, symbol: Any, tensor: Tensor, *, shaped: bool = False) -> Tensor:
        """Writes `symbol` to `tensor`; `shaped` where cuDNN cannot infer the extent."""
        symbol.set_output(True).set_data_type(self._type(tensor.dtype))
        if shaped:
            symbol.set_dim(list(tensor.size())).set_stride(_strides(tensor))
        self._pack[symbol] = tensor
        return tensor

    def virtual(self, symbol: Any, like: Tensor) -> Any:
        """Gives an intermediate its extent."""
        symbol.set_dim(list(like.size())).set_stride(_strides(like))
        return symbol

    def build(self) -> Callable[[], None]:
        """Finds an engine; returns what runs it on PyTorch's current stream."""
        self.node.validate()
        self.node.build_operation_graph()
        self.node.create_execution_plans([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
        self.node.check_support()
        self.node.build_plans()
        self._workspace = torch.empty(max(self.node.get_workspace_size(), 1), device="cuda", dtype=torch.uint8)

        def run() -> None:
            self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
            self.node.execute(self._pack, self._workspace, handle=self._handle)

        return run


Check = tuple[Tensor, Callable[[], Tensor]]  # an output, and what PyTorch has for it
Builder = Callable[[Graph, Operands], Check]


def _geometry(o: Operands) -> dict[str, list[int]]:
    return {"padding": [o.conv.padding] * 2, "stride": [o.conv.stride] * 2, "dilation": [1, 1]}


def _activated(g: Graph, o: Operands) -> Any:
    """relu(x * scale + bias): a batch norm's affine and activation as prologue."""
    x, scale, bias = g.input("x", o.x), g.input("scale", o.scale), g.input("bias", o.bias)
    scaled = g.node.scale(name="scale", input=x, scale=scale)
    return g.node.relu(name="relu", input=g.node.bias(name="bias", input=scaled, bias=bias))


def _statistics(g: Graph, o: Operands, y: Any) -> None:
    sums = g.node.genstats(name="genstats", input=y)
    for symbol in sums:
        g.output(symbol, torch.zeros(1, o.conv.outputs, 1, 1, device=o.x.device))


def conv_genstats(g: Graph, o: Operands) -> Check:
    """Convolution that also leaves the sums of y and y^2 per channel."""
    y = g.node.conv_fprop(image=g.input("x", o.x), weight=g.input("w", o.weight), **_geometry(o))
    out = g.output(y, torch.empty_like(o.dy))
    _statistics(g, o, y)
    return out, o.forward


def prologue_conv(g: Graph, o: Operands) -> Check:
    """scale + bias + relu, then the convolution."""
    y = g.node.conv_fprop(image=_activated(g, o), weight=g.input("w", o.weight), **_geometry(o))
    return g.output(y, torch.empty_like(o.dy)), o.forward_of_activated


def prologue_conv_genstats(g: Graph, o: Operands) -> Check:
    """Both."""
    y = g.node.conv_fprop(image=_activated(g, o), weight=g.input("w", o.weight), **_geometry(o))
    out = g.output(y, torch.empty_like(o.dy))
    _statistics(g, o, y)
    return out, o.forward_of_activated


def prologue_wgrad(g: Graph, o: Operands) -> Check:
    """Weight gradient whose input is recomputed: scale + bias + relu, then wgrad."""
    dw = g.node.conv_wgrad(image=_activated(g, o), loss=g.input("dy", o.dy), **_geometry(o))
    return g.output(dw, torch.empty_like(o.weight), shaped=True), o.wgrad_of_activated


def _dgrad_drelu(g: Graph, o: Operands) -> tuple[Any, dict[str, Any]]:
    """Gradient before the activation, and the norm's operands: y = (x - mean) * rstd * scale + bias is recomputed."""
    dx = g.node.conv_dgrad(loss=g.input("dy", o.dy), filter=g.input("w", o.weight), **_geometry(o))
    g.virtual(dx, o.x)
    parts = {name: torch.rand_like(o.scale, dtype=torch.float32) for name in ("mean", "rstd", "scale", "bias")}
    s = {name: g.input(name, value) for name, value in parts.items()}
    x = g.input("x", o.x)
    centred = g.node.sub(a=x, b=s["mean"])
    normalised = g.node.mul(a=centred, b=s["rstd"])
    y = g.node.add(a=g.node.mul(a=normalised, b=s["scale"]), b=s["bias"])
    return g.node.relu_backward(loss=dx, input=y), {"x": x, "values": parts, **s}


def _expected_drelu(o: Operands, parts: dict[str, Tensor]) -> Tensor:
    y = (o.x.float() - parts["mean"]) * parts["rstd"] * parts["scale"] + parts["bias"]
    return o.dgrad() * (y > 0)


def dgrad_drelu(g: Graph, o: Operands) -> Check:
    """Input gradient through the activation before the convolution."""
    drelu, parts = _dgrad_drelu(g, o)
    return g.output(drelu, torch.empty_like(o.x)), lambda: _expected_drelu(o, parts["values"])


def dgrad_drelu_bn_backward(g: Graph, o: Operands) -> Check:
    """The same, and the two reductions of the batch norm's backward, as cuDNN's DgradDreluBNBwdWeight has them."""
    if not hasattr(g.node, "dbn_weight"):
        raise UnsupportedError("this cudnn frontend has no dbn_weight in Python (C++ has)")
    drelu, parts = _dgrad_drelu(g, o)
    out = g.output(drelu, torch.empty_like(o.x))
    results = g.node.dbn_weight(drelu, parts["x"], parts["mean"], parts["rstd"], parts["scale"])
    for symbol in results:
        g.output(symbol, torch.zeros_like(o.scale, dtype=torch.float32))
    return out, lambda: _expected_drelu(o, parts["values"])


def dgrad_drelu_whole_bn_backward(g: Graph, o: Operands) -> Check:
    """The whole batch-norm backward behind dgrad and drelu, for what Python's `batchnorm_backward` node can do."""
    drelu, parts = _dgrad_drelu(g, o)
    out = g.output(drelu, torch.empty_like(o.x))
    dx, dscale, dbias = g.node.batchnorm_backward(
        grad=drelu, input=parts["x"], scale=parts["scale"], mean=parts["mean"], inv_variance=parts["rstd"]
    )
    g.output(dx, torch.empty_like(o.x))
    for symbol in (dscale, dbias):
        g.output(symbol, torch.zeros_like(o.scale, dtype=torch.float32))
    return out, lambda: _expected_drelu(o, parts["values"])


# name: (builder, the plain pass it stands for, whether intermediates are fp32)
PATTERNS: dict[str, tuple[Builder, str, bool]] = {
    "conv_genstats": (conv_genstats, "forward", False),
    "prologue_conv": (prologue_conv, "forward", False),
    "prologue_conv_genstats": (prologue_conv_genstats, "forward", False),
    "prologue_wgrad": (prologue_wgrad, "wgrad", True),
    "dgrad_drelu": (dgrad_drelu, "dgrad", True),
    "dgrad_drelu_bn_backward": (dgrad_drelu_bn_backward, "dgrad", True),
    "dgrad_drelu_whole_bn_backward": (dgrad_drelu_whole_bn_backward, "dgrad", True),
}
