"""What inference computes, as data: the steps of a network after folding, and the tensors they read.

A graph has one input of shape (N, C, H, W). Values are numbered; every step writes one value that no other writes. It
says what is computed, not where or by which kernel: the interpreter runs it with PyTorch's operators, the planner with
ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Pair = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Activation:
    """`kind`: one of `fused_resnet.ops`. `slope`: the tensor of prelu, of one element or one for each channel."""

    kind: str = "identity"
    negative_slope: float = 0.01
    slope: str | None = None


IDENTITY = Activation()


@dataclass(frozen=True)
class Step:
    """`name`: where in the model it comes from, for people. `inputs`: values it reads."""

    name: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Conv(Step):
    """`act(conv2d(a, weight, bias) + residual)`: a is inputs[0], or `pre(a * scale + shift)`; residual is inputs[1].

    Tensors: weight (K, C / groups, R, S); bias (K,) or None; scale and shift (C,), both or neither.
    """

    weight: str
    bias: str | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    act: Activation = IDENTITY
    scale: str | None = None
    shift: str | None = None
    pre: Activation = IDENTITY


@dataclass(frozen=True)
class Linear(Step):
    """`act(linear(a, weight, bias))` of a (N, C); weight (K, C)."""

    weight: str
    bias: str | None = None
    act: Activation = IDENTITY


@dataclass(frozen=True)
class Affine(Step):
    """`act(a * scale + shift [+ inputs[1]])`: a batch norm that no convolution could take in; scale and shift (C,)."""

    scale: str
    shift: str
    act: Activation = IDENTITY


@dataclass(frozen=True)
class Add(Step):
    """`act(inputs[0] + inputs[1])`, of equal shapes."""

    act: Activation = IDENTITY


@dataclass(frozen=True)
class Act(Step):
    """`act(a)`."""

    act: Activation = IDENTITY


@dataclass(frozen=True)
class MaxPool(Step):
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool(Step):
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True


@dataclass(frozen=True)
class GlobalAvgPool(Step):
    """(N, C, H, W) to (N, C, 1, 1)."""


@dataclass(frozen=True)
class Flatten(Step):
    """(N, C, H, W) to (N, C * H * W), in NCHW order."""


@dataclass(frozen=True)
class Reference:
    """A value (`int`) or a tensor (`str`) among the arguments of a stock operator."""

    to: int | str


@dataclass(frozen=True)
class Stock(Step):
    """A PyTorch operator that nothing above describes, such as "aten.cat.default", with its arguments.

    `args` and `kwargs` hold numbers, strings, booleans, None, `Reference`s, and tuples of these; a dtype, layout,
    device or memory format is a string such as "torch.float32". `index`: which of several results is the output; None:
    there is one.
    """

    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    index: int | None = None


@dataclass(frozen=True)
class Graph:
    """
    Attributes:
        steps: in an order in which they can run.
        input: the value that holds the images.
        outputs: the values to return.
        structure: how: None for the one tensor itself, "tuple" or "list" of them, or a tuple of the keys of a dict.
        tensors: by name, as the steps have them: float32 (float64 for a float64 model), contiguous, on the CPU.
        channels: C of the input.
        extent: (H, W) where the model runs at no other; None: it runs at any.
        batch: likewise N.
    """

    steps: tuple[Step, ...]
    input: int
    outputs: tuple[int, ...]
    structure: str | tuple[str, ...] | None
    tensors: Mapping[str, Tensor]
    channels: int
    extent: Pair | None = None
    batch: int | None = None
