"""A network for inference: a graph, and the plans of the shapes that it has met."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fused_resnet import _extension
from fused_resnet.inference import graph as g
from fused_resnet.inference.cuda import CudaRunner
from fused_resnet.inference.explain import table
from fused_resnet.inference.interpret import Interpreter, Output, check_input, structured
from fused_resnet.inference.plan import Plan
from fused_resnet.inference.weights import Numerics, Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A plan holds its packed weights, which plans of the same ways of packing share. More shapes in turn are planned anew.
_MOST_PLANS = 16

Self = TypeVar("Self", bound="InferenceModule")


class InferenceModule(nn.Module):
    """Runs a folded network; made by `fused_resnet.optimize_for_inference` or `fused_resnet.load_inference`.

    Call it with images of shape (N, C, H, W), float32, bfloat16, float16 or float64, in any layout, on `device`; what
    comes out has the images' dtype. Any number of threads may call it at once. It has no parameters, cannot be trained
    and lets no gradient through; it can be pickled, copied and saved (`fused_resnet.save_inference`).

    Args:
        graph: what to compute.
        dtype: in which it is computed.
        device: where.
        metadata: what a saved file says about it, such as the names of the classes.

    Attributes:
        graph, dtype, device, metadata: as given.
    """

    def __init__(
        self,
        graph: g.Graph,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise TypeError(f"InferenceModule: expected dtype to be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.graph = graph
        self.dtype = dtype
        self.device = _full(device or torch.device("cpu"))
        self.metadata = dict(metadata or {})
        super().train(False)
        self._lock, self._planning = threading.Lock(), threading.Lock()
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._weights: Weights | None = None
        self._fallback: Callable[[Tensor], Output] | None = None

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Output:
        """The network's output for `x`; see the class."""
        self._check(x)
        if torch._C._len_torch_dispatch_stack() and get_proxy_mode() is not None:
            raise RuntimeError("inference: expected images with values, got some that a tracer follows")
        with torch.no_grad():  # not inference_mode, whose tensors no later layer could be trained on
            output = structured(self.graph, self._plan(x)(x)) if self._planned(x) else self._others()(x)
            return _in_dtype(output, x.dtype)

    def explain(self, shape: tuple[int, int, int, int] | None = None, *, calls: int = 5) -> str:
        """The plan for images of `shape` as a table: step, output, kernel, time, share of this machine's ceiling.

        The ceiling is the best rate of multiply-adds that a convolution which stays in the cache reaches here and now,
        so a step beyond 100 % runs Winograd's algorithm, which multiplies less than is counted.

        Args:
            shape: (N, C, H, W); default: of the last call, else one image of 224 x 224 or of the graph's extent.
            calls: how often each step is timed; the fastest counts.
        """
        if shape is None:
            height, width = self.graph.extent or (224, 224)
            last = next(reversed(self._plans), None)
            shape = last[0] if last is not None else (self.graph.batch or 1, self.graph.channels, height, width)
        x = torch.zeros(shape, device=self.device)
        self._check(x)
        if not self._planned(x):
            return f"{len(self.graph.steps)} steps with PyTorch's operators on {self.device}: {self._why_stock()}"
        with torch.no_grad():
            return table(self._plan(x), x.to(self.dtype), calls)

    def extra_repr(self) -> str:
        """For `repr`."""
        return f"{len(self.graph.steps)} steps, {self.graph.channels} channels, {self.dtype}, {self.device}"

    def train(self: Self, mode: bool = True) -> Self:
        """Refuses to train: the batch norms are folded into the weights."""
        if mode:
            raise RuntimeError(
                "InferenceModule.train: expected a network that can be trained, got one folded for inference; train "
                "the original model and call optimize_for_inference again"
            )
        return self

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], *_args: Any, **_kwargs: Any) -> Self:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype is self.dtype and probe.device == self.device:
            return self
        raise RuntimeError(
            "InferenceModule: expected no change of dtype or device, got one; call "
            "optimize_for_inference(model, dtype=...) on the original model, on the device it shall run on"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"graph": self.graph, "dtype": self.dtype, "device": self.device, "metadata": self.metadata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["graph"], state["dtype"], device=state["device"], metadata=state["metadata"]
        )

    def _check(self, x: Tensor) -> None:
        check_input(self.graph, x)
        if x.dtype not in DTYPES:
            raise ValueError(f"inference: expected images of one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if _full(x.device) != self.device:
            raise ValueError(f"inference: expected images on {self.device}, got them on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "inference: expected images without gradient, got some that require one; the network is folded and "
                "has no backward pass"
            )

    def _planned(self, x: Tensor) -> bool:
        return self.device.type == "cpu" and _extension.available() and x.numel() > 0

    def _why_stock(self) -> str:
        return str(_extension.why_unavailable() or "the kernels are for CPUs, and for batches that are not empty")

    def _plan(self, x: Tensor) -> Plan:
        shape = tuple(x.shape)
        numerics: Numerics = _extension.extension().conv_numerics()
        key = (shape, _extension.extension().current_isa(), numerics)
        plan = self._known(key)
        if plan is None:
            with self._planning:  # calls of shapes that have a plan go on
                plan = self._known(key)
                if plan is None:
                    if self._weights is None:
                        self._weights = Weights(self.graph, self.dtype)
                    plan = Plan(self.graph, shape, self._weights, numerics=numerics)
                    self._weights.release()
                    with self._lock:
                        self._plans[key] = plan
                        while len(self._plans) > _MOST_PLANS:
                            self._plans.popitem(last=False)
        return plan

    def _known(self, key: tuple[Any, ...]) -> Plan | None:
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def _others(self) -> Callable[[Tensor], Output]:
        """What runs without a plan: PyTorch's operators, on a GPU recorded as CUDA graphs."""
        with self._lock:
            if self._fallback is None:
                runner = CudaRunner if self.device.type == "cuda" else Interpreter
                self._fallback = runner(self.graph, self.dtype, self.device)
            return self._fallback


def _full(device: torch.device) -> torch.device:
    """A device as its tensors name it."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is None and device.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _in_dtype(output: Output, dtype: torch.dtype) -> Output:
    def one(y: Tensor) -> Tensor:
        return y.to(dtype) if y.is_floating_point() else y

    if isinstance(output, Tensor):
        return one(output)
    if isinstance(output, dict):
        return {key: one(y) for key, y in output.items()}
    return type(output)(map(one, output))
