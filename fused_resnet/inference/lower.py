"""Captured operators as the steps of a graph, one by one: nothing is fused yet. A batch norm is an `Affine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor, fx
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
    Step,
    Stock,
)
from fused_resnet.inference.operators import encode_constant, is_constant, name_of

_INPUT = 0

# Their result is their first argument, as far as numbers go.
_IDENTITIES = {f"aten.{name}.default" for name in ("clone", "contiguous", "alias", "detach", "lift_fresh_copy")}
_DROPOUTS = {
    f"aten.{name}.default"
    for name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
}
_CASTS = {"aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device"}
_RESHAPES = {
    f"aten.{name}" for name in ("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints")
}
# They read strides, which are the runner's own business.
_LAYOUT_DEPENDENT = {f"aten.{name}.default" for name in ("as_strided", "set_", "stride", "is_contiguous")}


def lower(captured: Captured) -> Graph:
    """
    Raises:
        ValueError: an operator that no step can hold, such as one of another library.
    """
    return _Lowering(captured).run()


class _Lowering:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.dtype = captured.wide_dtype
        self.steps: list[Step] = []
        self.values: dict[fx.Node, int] = {captured.input: _INPUT}
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.last = _INPUT

    def run(self) -> Graph:
        for node in self.captured.graph.nodes:
            if node.op == "placeholder" and node.name in self.captured.tensors:
                self.names[node], self.constants[node] = self.captured.tensors[node.name]
        for node in self.live_nodes():
            self.lower_node(node)
        outputs = tuple(self.output(node) for node in self.captured.outputs)
        return Graph(
            steps=tuple(self.steps),
            input=_INPUT,
            outputs=outputs,
            structure=self.captured.structure,
            tensors=self.tensors,
            channels=self.captured.channels,
            extent=self.captured.extent,
            batch=self.captured.batch,
        )

    def live_nodes(self) -> list[fx.Node]:
        live: set[fx.Node] = set()
        queue = [node for node in self.captured.outputs if isinstance(node, fx.Node)]
        while queue:
            node = queue.pop()
            if node not in live:
                live.add(node)
                queue += node.all_input_nodes
        return [node for node in self.captured.graph.nodes if node in live and node.op != "placeholder"]

    def lower_node(self, node: fx.Node) -> None:
        if node.op != "call_function":
            raise ValueError(f"build_graph: expected operators, got {node.format_node()}")
        if self.is_selection(node):
            return  # its reader names the operator and the index
        if self.evaluate(node):
            return
        lowering = _LOWERINGS.get(str(node.target))
        if lowering is None or not lowering(self, node):
            self.stock(node)

    # What is known before any image comes: weights that are computed from parameters, say.

    def evaluate(self, node: fx.Node) -> bool:
        operands = node.all_input_nodes
        target = node.target
        if not all(operand in self.constants for operand in operands) or name_of(target) is None:
            return False
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            return False
        with torch.no_grad():
            result = target(  # type: ignore[operator]
                *fx.map_arg(node.args, self.constants.__getitem__),
                **fx.map_arg(node.kwargs, self.constants.__getitem__),
            )
        if not isinstance(result, Tensor):
            return False
        self.constants[node] = result.detach()
        self.names[node] = node.name
        return True

    # Values and tensors.

    def emit(self, kind: Callable[..., Step], node: fx.Node, inputs: tuple[int, ...], **fields: Any) -> int:
        self.last += 1
        self.steps.append(kind(path(node), inputs, self.last, **fields))
        return self.last

    def bind(self, node: fx.Node, value: int) -> bool:
        self.values[node] = value
        return True

    def tensor(self, name: str, tensor: Tensor) -> str:
        """The name under which the graph has this tensor; the same tensor may be there under several."""
        unique, count = name, 1
        while unique in self.tensors:
            unique, count = f"{name}.{count}", count + 1
        self.tensors[unique] = tensor
        return unique

    def constant(self, node: Any) -> Tensor | None:
        return self.constants.get(node) if isinstance(node, fx.Node) else None

    def named(self, node: fx.Node) -> str:
        """A constant among the arguments of a stock operator, once however often it is read."""
        name = self.names[node]
        if self.tensors.get(name) is not self.constants[node]:
            name = self.names[node] = self.tensor(name, self.constants[node])
        return name

    def features(self, node: Any, *ranks: int) -> int | None:
        """The value of a node if it holds activations of one of these ranks; None: another kind of thing."""
        if not isinstance(node, fx.Node) or node not in self.values:
            return None
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() not in ranks or not self.is_own_dtype(value.dtype):
            return None
        return self.values[node]

    def is_own_dtype(self, dtype: torch.dtype) -> bool:
        return dtype in (self.captured.dtype, self.dtype)

    def output(self, node: Any) -> int:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            raise ValueError(
                f"build_graph: expected a model that returns tensors only, got {node!r} among what it returns"
            )
        if node not in self.values:
            reference = (Reference(self.named(node)),)
            self.values[node] = self.emit(Stock, node, (), target="aten.clone.default", args=reference)
        return self.values[node]

    # Stock steps.

    def is_selection(self, node: fx.Node) -> bool:
        """Whether it has several results; each is a step of its own, which costs nothing where they are views."""
        return isinstance(node.meta.get("val"), (tuple, list))

    def stock(self, node: fx.Node) -> None:
        index = None
        operation = node
        if str(node.target) == "<built-in function getitem>":
            operation, index = node.args  # type: ignore[assignment]
        target = name_of(operation.target)
        if target is None or target in _LAYOUT_DEPENDENT:
            raise ValueError(
                f"build_graph: expected operators of PyTorch that do not depend on strides, got {operation.target} in "
                f"{path(operation)!r}"
            )
        if target in _RESHAPES and target != "aten.flatten.using_ints":
            target = "aten.reshape.default"  # a view depends on strides
        inputs: list[int] = []
        args = self.argument(operation.args, inputs)
        kwargs = {key: self.argument(value, inputs) for key, value in operation.kwargs.items() if key != "pin_memory"}
        value = self.emit(Stock, node, tuple(inputs), target=target, args=args, kwargs=kwargs, index=index)
        self.bind(node, value)

    def argument(self, value: Any, inputs: list[int]) -> Any:
        if isinstance(value, fx.Node):
            if value in self.constants:
                return Reference(self.named(value))
            if value not in self.values:
                raise ValueError(f"build_graph: expected operators with one result, got {value.target}")
            if self.values[value] not in inputs:
                inputs.append(self.values[value])
            return Reference(self.values[value])
        if isinstance(value, (list, tuple)):
            return tuple(self.argument(item, inputs) for item in value)
        if isinstance(value, torch.dtype) and self.is_own_dtype(value):
            return encode_constant(self.dtype)
        if is_constant(value):
            return encode_constant(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"build_graph: expected numbers, strings and tensors as arguments, got {value!r}")


def path(node: fx.Node) -> str:
    """Where in the model it stands: "layer1.0.conv1"; for what the model itself calls, the operator's name."""
    stack = node.meta.get("nn_module_stack") or {}
    where = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty_nn_module_stack")]
    return (where[-1].split("@")[0] if where else "") or node.name


def arguments(node: fx.Node) -> list[Any]:
    """All arguments in the order of the schema, with its defaults."""
    given = list(node.args)
    for argument in node.target._schema.arguments[len(given) :]:  # type: ignore[union-attr]
        given.append(node.kwargs.get(argument.name, argument.default_value))
    return given


def pair(value: Any) -> Pair | None:
    """Rows and columns; None: they depend on a size."""
    items = [value, value] if isinstance(value, int) else list(value)
    items = items * 2 if len(items) == 1 else items
    if len(items) != 2 or not all(isinstance(item, int) for item in items):
        return None
    return items[0], items[1]


def same_shape(a: Any, b: Any) -> bool:
    shapes = a.meta["val"].shape, b.meta["val"].shape
    return len(shapes[0]) == len(shapes[1]) and all(statically_known_true(p == q) for p, q in zip(*shapes, strict=True))


# Each makes the steps of one node and returns True, or makes none and returns False: it is then a stock step.


def _conv2d(low: _Lowering, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    if isinstance(padding, str):
        return _padded_conv2d(low, node)
    return _conv(low, node, low.features(x, 4), weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def _convolution(low: _Lowering, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
    if transposed:
        return False
    return _conv(low, node, low.features(x, 4), weight, bias, pair(stride), pair(padding), pair(dilation), groups)


def _padded_conv2d(low: _Lowering, node: fx.Node) -> bool:
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
    low: _Lowering,
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


def _linear(low: _Lowering, node: fx.Node) -> bool:
    x, weight, bias = arguments(node)
    value, matrix, offset = low.features(x, 2), low.constant(weight), low.constant(bias)
    if value is None or matrix is None or matrix.dim() != 2 or (bias is not None and offset is None):
        return False
    name = path(node)
    offset_name = None if offset is None else low.tensor(f"{name}.bias", offset)
    weight_name = low.tensor(f"{name}.weight", matrix)
    return low.bind(node, low.emit(Linear, node, (value,), weight=weight_name, bias=offset_name))


def _batch_norm(low: _Lowering, node: fx.Node) -> bool:
    x, weight, bias, mean, var, training, _, eps, _ = arguments(node)
    return not training and _affine(low, node, x, weight, bias, mean, var, eps)


def _batch_norm_result(low: _Lowering, node: fx.Node) -> bool:
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
    low: _Lowering, node: fx.Node, x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float
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


def _add(low: _Lowering, node: fx.Node) -> bool:
    a, b, alpha = arguments(node)
    first, second = low.features(a, 2, 4), low.features(b, 2, 4)
    if first is None or second is None or alpha != 1 or not same_shape(a, b):
        return False
    return low.bind(node, low.emit(Add, node, (first, second)))


def _activation(kind: str) -> Callable[[_Lowering, fx.Node], bool]:
    def lowering(low: _Lowering, node: fx.Node) -> bool:
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


def _max_pool2d(low: _Lowering, node: fx.Node) -> bool:
    return _max_pool(low, node, node)


def _max_pool(low: _Lowering, operation: fx.Node, node: fx.Node) -> bool:
    x, kernel, stride, padding, dilation, ceil_mode = arguments(operation)
    value = low.features(x, 4)
    window, step = pair(kernel), pair(stride or kernel)
    margin, spread = pair(padding), pair(dilation)
    if value is None or window is None or step is None or margin is None or spread is None:
        return False
    fields = {"kernel": window, "stride": step, "padding": margin, "dilation": spread, "ceil_mode": ceil_mode}
    return low.bind(node, low.emit(MaxPool, node, (value,), **fields))


def _avg_pool2d(low: _Lowering, node: fx.Node) -> bool:
    x, kernel, stride, padding, ceil_mode, count_include_pad, divisor = arguments(node)
    value = low.features(x, 4)
    window, step, margin = pair(kernel), pair(stride or kernel), pair(padding)
    if value is None or window is None or step is None or margin is None or divisor is not None:
        return False
    fields = {"kernel": window, "stride": step, "padding": margin}
    fields |= {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return low.bind(node, low.emit(AvgPool, node, (value,), **fields))


def _adaptive_avg_pool2d(low: _Lowering, node: fx.Node) -> bool:
    value = low.features(node.args[0], 4)
    if value is None or pair(node.args[1]) != (1, 1):
        return False
    return low.bind(node, low.emit(GlobalAvgPool, node, (value,)))


def _mean(low: _Lowering, node: fx.Node) -> bool:
    x, dims, keepdim, dtype = arguments(node)
    value = low.features(x, 4)
    if value is None or dtype is not None or not dims or sorted(dim % 4 for dim in dims) != [2, 3]:
        return False
    value = low.emit(GlobalAvgPool, node, (value,))
    return low.bind(node, value if keepdim else low.emit(Flatten, node, (value,)))


def _reshape(low: _Lowering, node: fx.Node) -> bool:
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


def _identity(low: _Lowering, node: fx.Node, x: Any) -> bool:
    return x in low.values and low.bind(node, low.values[x])


def _same_numbers(low: _Lowering, node: fx.Node) -> bool:
    return _identity(low, node, node.args[0])


def _slice(low: _Lowering, node: fx.Node) -> bool:
    """`x[:, :, ::2]` is three slices, two of them of everything."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return same_shape(x, node) and _identity(low, node, x)


def _dropout(low: _Lowering, node: fx.Node) -> bool:
    return not node.args[2] and _identity(low, node, node.args[0])


def _cast(low: _Lowering, node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = x.meta["val"].dtype, node.meta["val"].dtype
    same = before == after or (low.is_own_dtype(before) and low.is_own_dtype(after))
    return same and _identity(low, node, x)


_LOWERINGS: dict[str, Callable[[_Lowering, fx.Node], bool]] = {
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
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_IDENTITIES, _same_numbers),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_CASTS, _cast),
}
