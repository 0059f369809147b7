"""Where captured operators become steps: the values, tensors and stock steps that every operator's lowering needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_resnet.inference.export import Captured
from fused_resnet.inference.graph import Graph, Pair, Reference, Step, Stock
from fused_resnet.inference.operators import encode_constant, is_constant, name_of

_INPUT = 0
# They read strides, which are the runner's own business.
_LAYOUT_DEPENDENT = {f"aten.{name}.default" for name in ("as_strided", "set_", "stride", "is_contiguous")}
RESHAPES = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")


class Lowering:
    """`table` has for an operator's name what makes its steps and returns True, or makes none and returns False."""

    def __init__(self, captured: Captured, table: Mapping[str, Callable[[Lowering, fx.Node], bool]]) -> None:
        self.captured = captured
        self.table = table
        self.dtype = captured.wide_dtype
        self.steps: list[Step] = []
        self.values: dict[fx.Node, int] = {captured.input: _INPUT}
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.last = _INPUT

    def run(self) -> Graph:
        for node, (name, tensor) in self.captured.tensors.items():
            self.names[node], self.constants[node] = name, tensor
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
        lowering = self.table.get(str(node.target))
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
        if target in RESHAPES:
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
