"""Captured operators as the steps of a graph, one by one: nothing is fused yet. A batch norm is an `Affine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_resnet.inference.export import Captured
from fused_resnet.inference.graph import (
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
    Pair,
    Reference,
    Stock,
)
from fused_resnet.inference.lowering import RESHAPES, Lowering, arguments, pair, path, same_shape

# Their result is their first argument, as far as numbers go.
_IDENTITIES = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_CASTS = ("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device")


def lower(captured: Captured) -> Graph:
    """
    Raises:
        ValueError: an operator that no step can hold, such as one of another library.
    """
    return Lowering(captured, _LOWERINGS).run()


# Each makes the steps of one node and returns True, or makes none and returns False: it is then a stock step.


def _conv2d(low: Lowering, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    if isinstance(padding, str):
        return _padded_conv2d(low, node)
    return _conv(low, node, low.features(x, 4), weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def _convolution(low: Lowering, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
    if transposed:
        return False
    return _conv(low, node, low.features(x, 4), weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def _padded_conv2d(low: Lowering, node: fx.Node) -> bool:
    """Padding "same" of an even extent stands one more at the end: that one as an operator of its own."""
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    value, kernel, spread = low.features(x, 4), low.constant(weight), pair(dilation)
    if value is None or kernel is None or spread is None:
        return False
    total = (0, 0)
    if padding == "same":
        total = (spread[0] * (kernel.shape[2] - 1), spread[1] * (kernel.shape[3] - 1))
    rows, columns = total[0] % 2, total[1] % 2
    if rows or columns:
        args = (Reference(value), (0, columns, 0, rows))
        value = low.emit(Stock, node, (value,), target="aten.constant_pad_nd.default", args=args)
    return _conv(low, node, value, weight, bias, pair(stride), (total[0] // 2, total[1] // 2), spread, groups)


def _conv(
    low: Lowering,
    node: fx.Node,
    value: int | None,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Pair | None,
    padding: Pair | None,
    dilation: Pair | None,
    groups: int,
) -> bool:
    kernel, offset = low.constant(weight), low.constant(bias)
    if value is None or kernel is None or (bias is not None and offset is None):
        return False
    if stride is None or padding is None or dilation is None:
        return False
    name = path(node)
    return low.bind(
        node,
        low.emit(
            Conv,
            node,
            (value,),
            weight=low.tensor(f"{name}.weight", kernel),
            bias=None if offset is None else low.tensor(f"{name}.bias", offset),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        ),
    )


def _linear(low: Lowering, node: fx.Node) -> bool:
    x, weight, bias = arguments(node)
    value, matrix, offset = low.features(x, 2), low.constant(weight), low.constant(bias)
    if value is None or matrix is None or matrix.dim() != 2 or (bias is not None and offset is None):
        return False
    name = path(node)
    offset_name = None if offset is None else low.tensor(f"{name}.bias", offset)
    weight_name = low.tensor(f"{name}.weight", matrix)
    return low.bind(node, low.emit(Linear, node, (value,), weight=weight_name, bias=offset_name))


def _batch_norm(low: Lowering, node: fx.Node) -> bool:
    x, weight, bias, mean, var, training, _, eps, _ = arguments(node)
    return not training and _affine(low, node, x, weight, bias, mean, var, eps)


def _batch_norm_result(low: Lowering, node: fx.Node) -> bool:
    """The first of the results of a batch norm, or of a max-pool, that was taken apart."""
    operation, index = node.args
    assert isinstance(operation, fx.Node)
    if index != 0:
        return False
    if str(operation.target) == "aten._native_batch_norm_legit_no_training.default":
        x, weight, bias, mean, var, _, eps = arguments(operation)
        return _affine(low, node, x, weight, bias, mean, var, eps)
    if str(operation.target) == "aten.max_pool2d_with_indices.default":
        return _max_pool(low, operation, node)
    if str(operation.target) == "aten.native_dropout.default" and not operation.args[2]:
        return _identity(low, node, operation.args[0])
    return False


def _affine(
    low: Lowering, node: fx.Node, x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float
) -> bool:
    value = low.features(x, 2, 4)
    mean, var = low.constant(running_mean), low.constant(running_var)
    gamma, beta = low.constant(weight), low.constant(bias)
    if value is None or mean is None or var is None:
        return False
    if (weight is not None and gamma is None) or (bias is not None and beta is None):
        return False
    scale = (var.double() + eps).rsqrt()
    scale = scale if gamma is None else gamma.double() * scale
    shift = -mean.double() * scale
    shift = shift if beta is None else beta.double() + shift
    name = path(node)
    scale_name, shift_name = low.tensor(f"{name}.scale", scale), low.tensor(f"{name}.shift", shift)
    return low.bind(node, low.emit(Affine, node, (value,), scale=scale_name, shift=shift_name))


def _add(low: Lowering, node: fx.Node) -> bool:
    a, b, alpha = arguments(node)
    first, second = low.features(a, 2, 4), low.features(b, 2, 4)
    if first is None or second is None or alpha != 1 or not same_shape(a, b):
        return False
    return low.bind(node, low.emit(Add, node, (first, second)))


def _activation(kind: str) -> Callable[[Lowering, fx.Node], bool]:
    def lowering(low: Lowering, node: fx.Node) -> bool:
        x, *others = arguments(node)
        value = low.features(x, 2, 4)
        if value is None:
            return False
        act = Activation(kind)
        if kind == "leaky_relu":
            act = Activation(kind, negative_slope=float(others[0]))
        if kind == "prelu":
            slope = low.constant(others[0])
            if slope is None:
                return False
            act = Activation(kind, slope=low.tensor(f"{path(node)}.slope", slope.reshape(-1)))
        return low.bind(node, low.emit(Act, node, (value,), act=act))

    return lowering


def _max_pool2d(low: Lowering, node: fx.Node) -> bool:
    return _max_pool(low, node, node)


def _max_pool(low: Lowering, operation: fx.Node, node: fx.Node) -> bool:
    x, kernel, stride, padding, dilation, ceil_mode = arguments(operation)
    value = low.features(x, 4)
    window, step = pair(kernel), pair(stride or kernel)
    margin, spread = pair(padding), pair(dilation)
    if value is None or window is None or step is None or margin is None or spread is None:
        return False
    fields = {"kernel": window, "stride": step, "padding": margin, "dilation": spread, "ceil_mode": ceil_mode}
    return low.bind(node, low.emit(MaxPool, node, (value,), **fields))


def _avg_pool2d(low: Lowering, node: fx.Node) -> bool:
    x, kernel, stride, padding, ceil_mode, count_include_pad, divisor = arguments(node)
    value = low.features(x, 4)
    window, step, margin = pair(kernel), pair(stride or kernel), pair(padding)
    if value is None or window is None or step is None or margin is None or divisor is not None:
        return False
    fields = {"kernel": window, "stride": step, "padding": margin}
    fields |= {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return low.bind(node, low.emit(AvgPool, node, (value,), **fields))


def _adaptive_avg_pool2d(low: Lowering, node: fx.Node) -> bool:
    value = low.features(node.args[0], 4)
    if value is None or pair(node.args[1]) != (1, 1):
        return False
    return low.bind(node, low.emit(GlobalAvgPool, node, (value,)))


def _mean(low: Lowering, node: fx.Node) -> bool:
    x, dims, keepdim, dtype = arguments(node)
    value = low.features(x, 4)
    if value is None or dtype is not None or not dims or sorted(dim % 4 for dim in dims) != [2, 3]:
        return False
    value = low.emit(GlobalAvgPool, node, (value,))
    return low.bind(node, value if keepdim else low.emit(Flatten, node, (value,)))


def _reshape(low: Lowering, node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    value = low.features(x, 2, 4)
    if value is None:
        return False
    if same_shape(x, node):
        return low.bind(node, value)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if len(before) != 4 or len(after) != 2 or not statically_known_true(before[0] == after[0]):
        return False
    return low.bind(node, low.emit(Flatten, node, (value,)))


def _identity(low: Lowering, node: fx.Node, x: Any) -> bool:
    return x in low.values and low.bind(node, low.values[x])


def _same_numbers(low: Lowering, node: fx.Node) -> bool:
    return _identity(low, node, node.args[0])


def _slice(low: Lowering, node: fx.Node) -> bool:
    """`x[:, :, ::2]` is three slices, two of them of everything."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return same_shape(x, node) and _identity(low, node, x)


def _dropout(low: Lowering, node: fx.Node) -> bool:
    x, _, training = arguments(node)
    return not training and _identity(low, node, x)


def _cast(low: Lowering, node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = x.meta["val"].dtype, node.meta["val"].dtype
    same = before == after or (low.is_own_dtype(before) and low.is_own_dtype(after))
    return same and _identity(low, node, x)


_LOWERINGS: dict[str, Callable[[Lowering, fx.Node], bool]] = {
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.convolution.default": _convolution,
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _batch_norm,
    "<built-in function getitem>": _batch_norm_result,
    "aten.add.Tensor": _add,
    **{
        f"aten.{kind}.default": _activation(kind) for kind in ("relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu")
    },
    "aten.max_pool2d.default": _max_pool2d,
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.mean.dim": _mean,
    "aten.slice.Tensor": _slice,
    **dict.fromkeys((*RESHAPES, "aten.flatten.using_ints"), _reshape),
    **{f"aten.{name}.default": _same_numbers for name in _IDENTITIES},
    **{f"aten.{name}.default": _dropout for name in _DROPOUTS},
    **dict.fromkeys(_CASTS, _cast),
}
