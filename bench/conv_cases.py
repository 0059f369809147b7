"""The convolutions that are timed: operands, both contestants of each pass, an fp64 reference, and what must be moved.

Plain passes are the convolution alone. Fused passes add what a residual block has around it, by the convolution's role:
x is relu(norm(.)) of the convolution before for a middle or last one, and the block's input for a first one and a
shortcut; z, the output, always goes into a batch norm.

    forward fused   z = conv(relu(norm(x))) and the statistics of z. ATen: native_batch_norm with given statistics,
                    relu_, convolution, batch_norm_update_stats: the two halves of its batch norm, the same function.
    data fused      from the gradient behind z's batch norm to the gradient behind x's, with the relu's mask, or to x's.
                    Ours takes the sums of z's batch norm from the convolution behind and gives those of x's to the one
                    before; at a branch's end nobody gave them, and one more operator makes them. ATen has no such
                    halves: native_batch_norm_backward of z with its sums, convolution_backward, threshold_backward.
                    Over a whole block both make the sums of each batch norm once.
    weight fused    ours makes both operands again while it packs them. ATen has them in memory, from forward and from
                    the data gradient: it runs convolution_backward and nothing else.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor

from fused_resnet.ops._block import SMALL_IMAGE, takes_convolution

SHAPES = Path(__file__).resolve().parent / "shapes"
MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "cifar.resnet20")
PLAIN = ("forward", "data", "weight")
FUSED = tuple(f"{name} fused" for name in PLAIN)
PASSES = tuple(name for pair in zip(PLAIN, FUSED, strict=True) for name in pair)

EPS = 1e-5
IDENTITY, RELU, NO_SLOPE = 0, 1, 0.01  # the operators' numbers of activations, and a slope that they do not have
ROLES = ("stem", "first", "middle", "last", "shortcut")
CHANNELS_LAST = torch.channels_last

Tensors = tuple[Tensor, ...]
Call = Callable[[], Tensors]


@dataclass(frozen=True)
class Convolution:
    """One row of a shapes file; height and width are the input's."""

    name: str
    count: int  # how often the model holds it
    role: str  # one of ROLES: bench/shapes/derive.py
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    groups: int

    def __str__(self) -> str:
        text = f"{self.in_channels}->{self.out_channels} {self.height}x{self.width} {self.kernel}x{self.kernel}"
        text += f"/{self.stride}" if self.stride > 1 else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        reach = self.dilation * (self.kernel - 1) + 1
        h, w = ((n + 2 * self.padding - reach) // self.stride + 1 for n in (self.height, self.width))
        return h, w

    def macs(self) -> int:
        """Multiply-adds for one image, padding counted."""
        h, w = self.output_size()
        return h * w * self.out_channels * self.in_channels // self.groups * self.kernel**2

    def passes(self) -> tuple[str, ...]:
        """The passes that a training step has: an image has no gradient, and the stem is no part of a block."""
        return ("forward", "weight") if self.role == "stem" else PASSES

    def norm_before(self) -> bool:
        """Whether its input is relu(norm(.)) of another convolution."""
        return self.role in ("middle", "last")

    def ends_branch(self) -> bool:
        """Whether its batch norm goes into the block's add."""
        return self.role in ("last", "shortcut")


def load(model: str) -> list[Convolution]:
    """The rows of `bench/shapes/conv-<model>.csv`."""
    with (SHAPES / f"conv-{model}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("name", "role")
    return [Convolution(**{k: v if k in words else int(v) for k, v in row.items()}) for row in rows]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pass:
    """What is timed: the leading results of `own` are those of `aten`; `reference` has all of `own`'s, in fp64."""

    own: Call
    aten: Call
    reference: Call
    minimum_bytes: int


class Case:
    """One convolution at one batch and dtype, channels_last."""

    def __init__(self, conv: Convolution, batch: int, dtype: torch.dtype) -> None:
        self.conv, self.batch, self.dtype = conv, batch, dtype
        c, k, pair = conv.in_channels, conv.out_channels, lambda n: [n, n]
        self.geometry = (pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)
        self.aten_geometry = (*self.geometry[:3], False, [0, 0], conv.groups)
        fan_in = c // conv.groups * conv.kernel**2

        def activation(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype).to(memory_format=CHANNELS_LAST)

        self.x = activation(batch, c, conv.height, conv.width)
        drawn = torch.randn(k, c // conv.groups, conv.kernel, conv.kernel) * math.sqrt(2 / fan_in)
        self.w = drawn.to(dtype).to(memory_format=CHANNELS_LAST)
        self.g = activation(batch, k, *conv.output_size())
        # Parameters are fp32 also for bf16 activations: what autocast runs.
        self.weight, self.bias = torch.rand(c) + 0.5, torch.randn(c) * 0.1
        self.z_weight = torch.rand(k) + 0.5
        self.mean, self.var, self.rstd = self._statistics(self.x)
        self.running = torch.zeros(k), torch.ones(k)

        # What eager PyTorch has in memory when the backward pass comes.
        self.a = self._aten_operand()
        self.z = self._aten_conv(self.a)
        self.z_mean, _, self.z_rstd = self._statistics(self.z)
        self.dz = self._aten_norm_backward()
        normed = (self.z.double() - self._channel(self.z_mean)) * self._channel(self.z_rstd)
        self.sums = (self.g.double() * normed).sum((0, 2, 3)).float(), self.g.double().sum((0, 2, 3)).float()

    @staticmethod
    def _statistics(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(t.double(), (0, 2, 3), correction=0)
        return mean.float(), var.float(), (var + EPS).rsqrt().float()

    @staticmethod
    def _channel(t: Tensor) -> Tensor:
        return t.double().view(1, -1, 1, 1)

    def flops(self) -> int:
        """Of each pass: a multiply-add is two; batch norm's are not counted."""
        return 2 * self.batch * self.conv.macs()

    def tensor_bytes(self) -> int:
        """Bytes of the larger of input and output."""
        return max(self.x.numel(), self.z.numel()) * self.x.element_size()

    # ATen

    def _aten_conv(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten.convolution.default(x, self.w, None, *self.aten_geometry)
        return y

    def _aten_operand(self) -> Tensor:
        if not self.conv.norm_before():
            return self.x
        y = torch.ops.aten.native_batch_norm.default(
            self.x, self.weight, self.bias, self.mean, self.var, False, 0.1, EPS
        )[0]
        return torch.relu_(y)

    def _aten_norm_backward(self) -> Tensor:
        dz: Tensor = torch.ops.aten.native_batch_norm_backward.default(
            self.g, self.z, self.z_weight, None, None, self.z_mean, self.z_rstd, True, EPS, [True, True, True]
        )[0]
        return dz

    def _aten_backward(self, dy: Tensor, x: Tensor, w: Tensor, want: int) -> Tensor:
        wanted = [index == want for index in range(3)]
        dx: Tensor = torch.ops.aten.convolution_backward.default(dy, x, w, None, *self.aten_geometry, wanted)[want]
        return dx

    def _aten_forward_fused(self) -> Tensors:
        z = self._aten_conv(self._aten_operand())
        return (z, *torch.ops.aten.batch_norm_update_stats.default(z, *self.running, 0.1))

    def _aten_data_fused(self) -> Tensors:
        da = self._aten_backward(self._aten_norm_backward(), self.a, self.w, 0)
        return (torch.ops.aten.threshold_backward.default(da, self.a, 0) if self.conv.norm_before() else da,)

    # Ours

    def plan(self, name: str) -> str:
        """What the package runs for a pass: "own" kernels, which are what is timed, or "aten"."""
        stride, _, dilation, groups = self.geometry
        if "fused" in name:
            small = self.conv.height * self.conv.width <= SMALL_IMAGE
            inside = takes_convolution(tuple(self.w.shape), tuple(stride), tuple(dilation), groups, small)
            return "own" if inside else "aten"
        forward = torch.ops.fused_resnet.conv2d_forward.default
        backward = torch.ops.fused_resnet.conv2d_backward.default
        wanted = [name == "data", name == "weight", False]
        names = timing.events(
            lambda: (
                forward(self.x, self.w, None, *self.geometry)
                if name == "forward"
                else backward(self.g, self.x, self.w, False, *self.geometry, wanted)
            )
        )
        return "aten" if any(map(is_stock, names)) else "own"

    def _own_forward(self) -> Tensors:
        return (self._own_norm_forward(norm=False, training=False)[0],)

    def _own_norm_forward(self, *, norm: bool, training: bool) -> Tensors:
        before = self._before() if norm else (None,) * 4
        result: Tensors = torch.ops.fused_resnet.conv2d_norm_forward.default(
            self.x, *before, RELU, NO_SLOPE, self.w, *self.geometry, *self.running, training, EPS
        )
        return result

    def _own_backward(self, want: int) -> Tensors:
        return (self._own_norm_data(None)[0],) if want == 0 else (self._own_norm_weight(None),)

    def _own_sums(self) -> Tensors:
        """Those of z's batch norm, as the block's operator makes them at the end of a branch."""
        nothing, wanted = (None,) * 8, [False, True, True, False, False, False, False]
        sums: Tensors = torch.ops.fused_resnet.batch_norm_act_backward.default(
            self.g, self.z, self.z_mean, self.z_rstd, self.z_weight, *nothing, True, False, IDENTITY, NO_SLOPE, wanted
        )[1:3]
        return sums

    def _around(self, sums: Tensors | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments about the batch norm behind the convolution, with its sums, and about that before it."""
        if sums is None:
            return (None,) * 7 + (True,), (None,) * 4
        behind = (None, self.z, self.z_mean, self.z_rstd, self.z_weight, *sums, True)
        return behind, self._before()

    def _before(self) -> tuple[Any, ...]:
        return (self.mean, self.rstd, self.weight, self.bias) if self.conv.norm_before() else (None,) * 4

    def _own_norm_data(self, sums: Tensors | None) -> Tensors:
        behind, before = self._around(sums)
        result: Tensors = torch.ops.fused_resnet.conv2d_norm_backward_data.default(
            self.g, *behind, self.w, self.x, *before, RELU, NO_SLOPE, None, None, *self.geometry
        )
        return result

    def _own_norm_weight(self, sums: Tensors | None) -> Tensor:
        behind, before = self._around(sums)
        dw: Tensor = torch.ops.fused_resnet.conv2d_norm_backward_weight.default(
            self.g, *behind, self.w, self.x, *before, RELU, NO_SLOPE, *self.geometry
        )[0]
        return dw

    def _own_data_fused(self) -> Tensors:
        sums = self._own_sums() if self.conv.ends_branch() else self.sums
        result = self._own_norm_data(sums)
        return (*(result if self.conv.norm_before() else result[:1]), *sums)

    def _own_forward_fused(self) -> Tensors:
        z, mean, _, var = self._own_norm_forward(norm=True, training=True)
        return z, mean, var

    # fp64, from the very numbers that both sides get

    @cached_property
    def _normed64(self) -> Tensor:
        return (self.x.double() - self._channel(self.mean)) * self._channel(self.rstd)

    @cached_property
    def _pre64(self) -> Tensor:
        return self._normed64 * self._channel(self.weight) + self._channel(self.bias)

    @cached_property
    def _dz64(self) -> Tensor:
        normed = (self.z.double() - self._channel(self.z_mean)) * self._channel(self.z_rstd)
        g, count = self.g.double(), self.z.numel() // self.z.shape[1]
        weight, bias = (self._channel(t) for t in self.sums)
        return (g - bias / count - normed * weight / count) * self._channel(self.z_rstd * self.z_weight)

    @cached_property
    def _a64(self) -> Tensor:
        return self._pre64.relu() if self.conv.norm_before() else self.x.double()

    def _conv64(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten.convolution.default(x.contiguous(), self.w.double(), None, *self.aten_geometry)
        return y

    def _backward64(self, dy: Tensor, x: Tensor, want: int) -> Tensor:
        return self._aten_backward(dy.double().contiguous(), x.double().contiguous(), self.w.double(), want)

    def _forward_fused64(self) -> Tensors:
        z = self._conv64(self._a64)
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        return z, mean, var

    def _data_fused64(self) -> Tensors:
        dx = self._backward64(self._dz64, self._a64, 0)
        if not self.conv.norm_before():
            return dx, *self.sums
        dx *= self._pre64 > 0
        return dx, (dx * self._normed64).sum((0, 2, 3)), dx.sum((0, 2, 3)), *self.sums

    def forget_reference(self) -> None:
        """Frees what the references share."""
        for name in ("_normed64", "_pre64", "_a64", "_dz64"):
            self.__dict__.pop(name, None)

    # The passes

    def pass_(self, name: str) -> Pass:
        """One of PASSES. The bytes are those of every operand and result once, of x what the kernel's taps touch."""
        size, x, z, w = self.x.element_size(), self.x.numel(), self.z.numel(), self.w.numel()
        read_x = int(x * min(1.0, self.conv.kernel / self.conv.stride) ** 2)
        g = self.g
        return {
            "forward": lambda: Pass(
                self._own_forward, lambda: (self._aten_conv(self.x),), lambda: (self._conv64(self.x.double()),),
                size * (read_x + w + z),
            ),
            "forward fused": lambda: Pass(
                self._own_forward_fused, self._aten_forward_fused, self._forward_fused64, size * (read_x + w + z),
            ),
            "data": lambda: Pass(
                lambda: self._own_backward(0), lambda: (self._aten_backward(g, self.x, self.w, 0),),
                lambda: (self._backward64(g, self.x, 0),), size * (z + w + x),
            ),
            "data fused": lambda: Pass(
                self._own_data_fused, self._aten_data_fused, self._data_fused64,
                size * (2 * z + w + x + read_x * self.conv.norm_before()),
            ),
            "weight": lambda: Pass(
                lambda: self._own_backward(1), lambda: (self._aten_backward(g, self.x, self.w, 1),),
                lambda: (self._backward64(g, self.x, 1),), size * (z + read_x + w),
            ),
            "weight fused": lambda: Pass(
                lambda: (self._own_norm_weight(self.sums),),
                lambda: (self._aten_backward(self.dz, self.a, self.w, 1),),
                lambda: (self._backward64(self._dz64, self._a64, 1),), size * (2 * z + read_x + w),
            ),
        }[name]()  # fmt: skip


def is_stock(operator: str) -> bool:
    """Whether an operator's name is that of one of ATen's convolutions or batch norms."""
    return operator.startswith(("aten::", "mkldnn::")) and any(w in operator for w in ("conv", "batch_norm", "mkldnn"))
