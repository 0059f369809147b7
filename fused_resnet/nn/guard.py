"""The one decision: does a unit run fused, or as stock PyTorch, and why?

A fused unit reads the parameters of its children and never calls them. That is only right while nobody could tell the
difference, so everything that hangs on *calling* the children (hooks, replaced or parametrised children, tracers) and
everything the kernels do not know (subclasses, transforms, devices, dtypes) sends the unit to its stock path, which is
torchvision's plain forward: exact, never an error.

`why_stock` runs on every forward of every unit. It reads instance dictionaries, because attribute access on
``nn.Module`` goes through ``__getattr__`` and costs several times as much, and it is plain enough for
``torch.compile(fullgraph=True)`` to trace: there the checks become guards of the compiled graph.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import BatchNorm2d, Conv2d, MaxPool2d, ReLU, Sequential
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fused_resnet import _extension

_UNAVAILABLE = _extension.why_unavailable()  # settled once, as in fused_resnet.ops
_PLAIN_TENSORS = (nn.Parameter, Tensor)
PLAIN_OR_NONE = (nn.Parameter, Tensor, type(None))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# torch mutates these four dictionaries and never rebinds them.
_GLOBAL_FORWARD_HOOKS = _module._global_forward_hooks
_GLOBAL_FORWARD_PRE_HOOKS = _module._global_forward_pre_hooks
_GLOBAL_BACKWARD_HOOKS = _module._global_backward_hooks
_GLOBAL_BACKWARD_PRE_HOOKS = _module._global_backward_pre_hooks

# What the children's classes do when they are called.
_CONV_FORWARD, _CONV_INNER = Conv2d.forward, Conv2d._conv_forward
_NORM_FORWARD, _RELU_FORWARD = BatchNorm2d.forward, ReLU.forward

_stock_requests = 0
_observer: Callable[["FusedUnit", str | None], None] | None = None


class FusedUnit(nn.Module):
    """A module whose forward may run fused; it names the children that are then read instead of called."""

    fused_convs: ClassVar[tuple[str, ...]] = ()
    fused_norms: ClassVar[tuple[str, ...]] = ()
    fused_relus: ClassVar[tuple[str, ...]] = ()

    def why_stock_children(self) -> str | None:
        """Says why a child must be called and not only read; None: none must."""
        return _why_stock_children(self)

    def read_children(self) -> list[nn.Module] | None:
        """The children read while it runs fused, where they are others than the named ones."""
        return None

    def exceptions(self) -> str | None:
        """What it still calls while it runs fused; None: `explain` looks."""
        return None


@contextmanager
def stock() -> Iterator[None]:
    """Within this context every unit takes its stock path: the baseline of tests and benchmarks.

    The setting is of the process, not of the thread, because backward and data-parallel replicas run on other threads.
    """
    global _stock_requests
    _stock_requests += 1
    try:
        yield
    finally:
        _stock_requests -= 1


@contextmanager
def observed(observer: Callable[[FusedUnit, str | None], None]) -> Iterator[None]:
    """Within this context `observer` is told of every unit that runs in this process, and why it runs stock, if so."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def why_stock(unit: FusedUnit, *tensors: Tensor) -> str | None:
    """Says why `unit` must take its stock path for these inputs; None means that it runs fused.

    Args:
        unit: the module about to run.
        tensors: its inputs, activations of shape (N, C, H, W). Without any, only what does not depend on the input is
            examined.

    Returns:
        One reason as a short sentence, the first found, or None.
    """
    reason = _why_stock_now() or why_stock_tensors(tensors) or unit.why_stock_children()
    if _observer is not None:
        _observer(unit, reason)
    return reason


def why_stock_residual(z: Tensor, residual: Tensor) -> str | None:
    """Says why `residual` cannot enter the fused add after `z`: stock PyTorch then adds it, by its own rules."""
    if type(residual) not in _PLAIN_TENSORS:
        return f"the residual is a {_name(residual)}, not a plain tensor"
    if residual.dtype is not z.dtype:
        return f"the residual is {residual.dtype}, the convolution's output {z.dtype}"
    if residual.shape != z.shape:
        return f"the residual is {tuple(residual.shape)}, the convolution's output {tuple(z.shape)}"
    return None


def why_stock_downsample(downsample: nn.Module) -> str | None:
    """Says why a shortcut branch is called as a module; None: it is exactly Sequential(Conv2d, BatchNorm2d)."""
    if type(downsample) is not Sequential:
        return f"downsample is {_name(downsample)}, not Sequential"
    reason = why_called(downsample.__dict__)
    if reason is not None:
        return f"downsample {reason}"
    children = tuple(downsample.__dict__["_modules"].values())
    if len(children) != 2:
        return f"downsample has {len(children)} children, not convolution and batch norm"
    reason = why_stock_conv(children[0])
    if reason is not None:
        return f"downsample.0 {reason}"
    reason = why_stock_norm(children[1])
    if reason is not None:
        return f"downsample.1 {reason}"
    return None


def why_stock_max_pool(pool: Any) -> str | None:
    """Says why a max-pool is called as a module; None: it is the one that ends a ResNet's stem."""
    if type(pool) is not MaxPool2d:
        return f"is {_name(pool)}, not MaxPool2d"
    state = pool.__dict__
    if (
        state["kernel_size"] not in (3, (3, 3))
        or state["stride"] not in (2, (2, 2))
        or state["padding"] not in (1, (1, 1))
        or state["dilation"] not in (1, (1, 1))
        or state["ceil_mode"]
        or state["return_indices"]
    ):
        return "is not the 3x3 max-pool of stride 2 and padding 1"
    return why_called(state)


def _why_stock_now() -> str | None:
    """What concerns the process, the thread or the tracer, not the unit."""
    if _UNAVAILABLE is not None:
        return _UNAVAILABLE
    if _stock_requests:
        return "stock() is in force"
    if _GLOBAL_FORWARD_HOOKS or _GLOBAL_FORWARD_PRE_HOOKS or _GLOBAL_BACKWARD_HOOKS or _GLOBAL_BACKWARD_PRE_HOOKS:
        return "a global module hook is registered"
    if (
        Conv2d.forward is not _CONV_FORWARD
        or Conv2d._conv_forward is not _CONV_INNER
        or BatchNorm2d.forward is not _NORM_FORWARD
        or ReLU.forward is not _RELU_FORWARD
    ):
        return "a class of torch.nn has another forward than PyTorch's"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.compiler.is_compiling():
        return "torch.export is tracing" if _is_exporting() else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit or ONNX export is tracing"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"  # flop counters, make_fx, fake tensors: they expect ATen's operators
    if torch._C._len_torch_function_stack() and _is_function_mode_active():
        return "a TorchFunctionMode is active"
    return None


def _is_function_mode_active() -> bool:
    # A default device is one too, of factory functions alone.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# As below. Traced, this very question is answered yes under any torch.compile by PyTorch before 2.13.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_stock_tensors(tensors: tuple[Tensor, ...]) -> str | None:
    """Says why one of these activations has no kernel."""
    for x in tensors:
        if type(x) not in _PLAIN_TENSORS:  # fx Proxy and every subclass; first, because nothing else is sure of them
            return f"the input is a {_name(x)}, not a plain tensor"
        if not x.is_cpu:
            if not x.is_cuda:
                return f"no kernel for device {x.device.type}"
            reason = _why_stock_cuda(x.device.index)
            if reason is not None:
                return reason
        if x.dtype not in _DTYPES:
            return f"no kernel for {x.dtype}"
        if x.dim() != 4 or x.layout is not torch.strided:
            return "the input is not a dense (N, C, H, W) tensor"
    return None


_cuda_refusal_said = False


def _why_stock_cuda(index: int) -> str | None:
    """Says why CUDA tensors of this device take the stock path; said once by a warning."""
    global _cuda_refusal_said
    reason = _extension.why_no_cuda(index)
    if reason is not None and not _cuda_refusal_said:
        _cuda_refusal_said = True
        warnings.warn(f"{reason} Units with CUDA tensors run stock PyTorch.", RuntimeWarning, stacklevel=2)
    return reason


# What torch.compiler.assume_constant_result does; called at import, that would import the whole compiler.
_why_stock_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parameters_of(state: dict[str, Any]) -> dict[str, Any]:
    """A module's parameters by name, from its instance dictionary.

    A replica of ``nn.DataParallel`` keeps only those that are None where they belong; its copies are named apart.
    """
    parameters: dict[str, Any] = state["_parameters"]
    copies = state.get("_former_parameters")
    return {**parameters, **copies} if copies else parameters


def pair(value: Any) -> tuple[int, int]:
    """What a convolution holds as stride, padding or dilation, for rows and columns: anything that ATen takes."""
    if isinstance(value, int):
        return (value, value)
    return value if type(value) is tuple and len(value) == 2 else (value[0], value[-1])


def _why_stock_children(unit: FusedUnit) -> str | None:
    children = unit.__dict__["_modules"]
    for name in unit.fused_convs:
        reason = why_stock_conv(children.get(name))
        if reason is not None:
            return f"{name} {reason}"
    for name in unit.fused_norms:
        reason = why_stock_norm(children.get(name))
        if reason is not None:
            return f"{name} {reason}"
    for name in unit.fused_relus:
        child = children.get(name)
        if type(child) is not ReLU:
            return f"{name} is {_name(child)}, not ReLU"
        reason = why_called(child.__dict__)
        if reason is not None:
            return f"{name} {reason}"
    return None


def why_stock_conv(child: Any) -> str | None:
    """Says why a convolution is called as a module; None: a plain Conv2d that may be read instead."""
    if type(child) is not Conv2d:  # parametrised and quantised modules have another type
        return f"is {_name(child)}, not Conv2d"
    state = child.__dict__
    parameters = parameters_of(state)
    if type(parameters.get("weight")) not in _PLAIN_TENSORS or type(parameters.get("bias", 0)) not in PLAIN_OR_NONE:
        return "has a weight or bias that is pruned, computed or a tensor subclass"
    if "_conv_forward" in state:
        return "has a _conv_forward of its own"
    if state["padding_mode"] != "zeros" or type(state["padding"]) is str:
        return f"pads with mode {state['padding_mode']!r}, padding {state['padding']!r}"
    return why_called(state)


def why_stock_norm(child: Any) -> str | None:
    """Says why a batch norm is called as a module; None: a plain BatchNorm2d that may be read instead."""
    if type(child) is not BatchNorm2d:
        return f"is {_name(child)}, not BatchNorm2d"
    state = child.__dict__
    return why_stock_norm_state(state) or why_called(state)


def why_stock_norm_state(state: dict[str, Any]) -> str | None:
    """Says why what a batch norm holds in its instance dictionary cannot be read; None: it can."""
    parameters, buffers = parameters_of(state), state["_buffers"]
    # Written out: a loop over the names costs as much as all its lookups. 0 stands for a missing name.
    if (
        type(parameters.get("weight", 0)) not in PLAIN_OR_NONE
        or type(parameters.get("bias", 0)) not in PLAIN_OR_NONE
        or type(buffers.get("running_mean", 0)) not in PLAIN_OR_NONE
        or type(buffers.get("running_var", 0)) not in PLAIN_OR_NONE
        or type(buffers.get("num_batches_tracked", 0)) not in PLAIN_OR_NONE
    ):
        return "has a parameter or statistic that is pruned, computed or a tensor subclass"
    if not state["eps"] > 0:
        return f"has eps {state['eps']!r}"
    return None


def why_called(state: dict[str, Any]) -> str | None:
    """Says why a child must be called and not only read; `state` is its instance dictionary."""
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return "has a forward hook"
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return "has a backward hook"
    if "forward" in state or state.get("_compiled_call_impl") is not None:
        return "has a forward of its own"
    return None


def _name(thing: object) -> str:
    return "missing" if thing is None else type(thing).__name__
