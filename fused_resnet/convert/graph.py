"""Turns a module's forward into a plan: the same forward with its batch norms fused with what stands around them.

The module is traced one level deep (its children stay calls; a Sequential of plain layers is looked into), patterns
are found in the graph, and each is replaced by one call from `calls`. A pattern is replaced only if nothing can tell
the difference: what it computes on the way has no other reader, and no other operation stands in between that could
change one of its inputs in place.

    bn [+ act]           bn + act + conv           bn + act + max-pool 3x3/2
    bn + add [+ act]     bn, bn' + add [+ act]     add + act
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.convert import calls
from fused_resnet.convert.source import NotStraightError
from fused_resnet.nn import guard

_ADD: tuple[Any, ...] = (operator.add, torch.add)
_ADD_INPLACE: tuple[Any, ...] = (operator.iadd, "add_")
_ACT_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}


@dataclass
class Rewrite:
    """A fused forward and the children it reads, by path."""

    run: Callable[..., Any]  # run(module, *inputs)
    convs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    acts: tuple[str, ...] = ()  # and identities
    pools: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()  # Sequentials that were looked into; "" is the module itself
    fused: tuple[str, ...] = ()  # one description for each replaced pattern
    left: dict[str, str] = field(default_factory=dict)  # norms that stay calls, and why


@dataclass
class _Match:
    """Nodes that one call replaces; `last` is where the call stands."""

    function: Callable[..., Any]
    operands: list[Any]  # nodes, paths of children as _Child, activation names
    nodes: list[fx.Node]  # the first is the batch norm, or the addition, that the match is about
    last: fx.Node


@dataclass(frozen=True)
class _Child:
    path: str


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args  # whose own type is a union of everything


class _Proxy(fx.Proxy):
    """A proxy that knows `+=`, which fx would record as an addition out of place."""


def _inplace(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _inplace(_name))


class _Tracer(fx.Tracer):
    """Children are leaves, except Sequentials of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.containers: list[str] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, *_: Any) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs or not looks_into(m):
            return super().call_module(m, forward, args, kwargs)
        self.containers.append(self.path_of_module(m))
        (value,) = args
        for child in m.children():
            value = child(value)
        return value


def is_chain(cls: Any) -> bool:
    """Whether modules of this class call their children in order and do nothing else, as Sequential does."""
    return getattr(cls, "converted_from", cls).forward is nn.Sequential.forward


def looks_into(module: nn.Module) -> bool:
    """Whether a plan takes a child apart: a Sequential of plain layers, such as a stem or a downsample branch."""
    children = list(module.children())
    plain = is_chain(type(module)) and guard.why_called(module.__dict__) is None
    return plain and bool(children) and not any(list(child.children()) for child in children)


def trace(module: nn.Module) -> tuple[fx.Graph, tuple[str, ...]]:
    """The graph of one run of a module's forward, and the Sequentials that it looks into.

    Raises:
        NotStraightError: fx cannot follow it, or found a constant tensor on the way.
    """
    if is_chain(type(module)):
        return _chain(module), ("",)
    tracer = _Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:  # whatever a forward may raise when it meets a proxy
        reason = str(error).partition("\n")[0] or repr(error)
        raise NotStraightError(f"fx cannot trace its forward: {reason}") from error
    known = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            raise NotStraightError(f"its forward uses the tensor {node.target}, neither parameter nor buffer")
    return graph, tuple(dict.fromkeys(tracer.containers))


def _chain(module: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def rewrite(module: nn.Module) -> Rewrite:
    """Trace `module`, fuse what can be, and return the fused forward.

    Raises:
        NotStraightError: it cannot be traced, or there is nothing to fuse.
    """
    graph, containers = trace(module)
    return _Rewriter(module, graph, containers).rewrite()


class _Rewriter:
    def __init__(self, module: nn.Module, graph: fx.Graph, containers: tuple[str, ...]) -> None:
        self.module, self.graph = module, graph
        self.calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.taken: set[fx.Node] = set()
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.result = Rewrite(run=lambda *_: None, containers=containers)

    def rewrite(self) -> Rewrite:
        matches = list(self.matches())
        left = {path: why for node in self.order if (path := self.norm_path(node)) and (why := self.why_left(node))}
        if not any(match.function is not calls.add_act for match in matches):
            raise NotStraightError("; ".join(f"{path} {why}" for path, why in left.items()) or "no batch norm to fuse")
        for match in matches:
            self.replace(match)
        for node in list(self.graph.nodes):
            if self.child(node) is not None and guard.why_stock_conv(self.child(node)) is None:
                self.replace(_Match(calls.convolution, [_args(node)[0], _Child(str(node.target))], [node], node))
        self.graph.lint()
        self.result.run = type(fx.GraphModule(self.module, self.graph)).forward
        self.result.fused = tuple(self.describe(match) for match in matches)
        self.result.left = left
        return self.result

    # What a node is.

    def child(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one tensor and nothing else."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        return self.module.get_submodule(str(node.target)) if isinstance(node.args[0], fx.Node) else None

    def norm_path(self, node: fx.Node) -> str | None:
        return str(node.target) if isinstance(self.child(node), nn.modules.batchnorm._BatchNorm) else None

    def why_left(self, node: fx.Node) -> str | None:
        if node in self.taken:
            return None
        if self.calls[str(node.target)] > 1:
            return "is called more than once"
        return guard.why_stock_norm(self.child(node)) or "stands where it cannot be fused"

    def is_norm(self, node: Any) -> bool:
        """A batch norm that can be read, is called once, and belongs to no earlier match."""
        child = self.child(node)
        return (
            child is not None
            and guard.why_stock_norm(child) is None
            and self.calls[str(node.target)] == 1
            and node not in self.taken
        )

    def act(self, node: Any) -> Any:
        """The activation that a node is, as an operand for `calls`, else None."""
        if not isinstance(node, fx.Node):
            return None
        child = self.child(node)
        if child is not None:
            readable = calls.act_name(type(child)) is not None and not guard.why_called(child.__dict__)
            return _Child(str(node.target)) if readable else None
        if node.op in ("call_function", "call_method") and len(node.args) == 1 and not set(node.kwargs) - {"inplace"}:
            return _ACT_FUNCTIONS.get(node.target)
        return None

    def is_add(self, node: Any) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op in ("call_function", "call_method")
            and (node.target in _ADD or node.target in _ADD_INPLACE or (node.op, node.target) == ("call_method", "add"))
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(arg, fx.Node) for arg in node.args)
            and _args(node)[0] is not _args(node)[1]
        )

    def is_identity(self, node: Any) -> bool:
        child = self.child(node)
        return child is not None and type(child) is nn.Identity and not guard.why_called(child.__dict__)

    def is_private(self, node: Any) -> bool:
        """A fresh result of a convolution with one reader: nobody else can see or change it."""
        return type(self.child(node)) is nn.Conv2d and len(node.users) == 1

    # Patterns.

    def follow(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The one reader of the last node, past identities, which join the pattern. None: several, or none."""
        while len(nodes[-1].users) == 1:
            (user,) = nodes[-1].users
            if not self.is_identity(user):
                return user
            nodes.append(user)
        return None

    def matches(self) -> Iterator[_Match]:
        for node in self.order:
            if self.is_norm(node):
                match = self.norm_match(node)
            elif self.is_add(node) and node not in self.taken:
                match = self.add_match(node)
            else:
                match = None
            if match is not None:
                self.taken.update(match.nodes)
                yield match

    def norm_match(self, norm: fx.Node) -> _Match | None:
        z, bn = _args(norm)[0], _Child(str(norm.target))
        candidates = [self.with_add(norm, z, bn), *self.with_act(norm, z, bn)]
        candidates.append(_Match(calls.norm_act, [z, bn, "identity"], [norm], norm))
        return next(match for match in candidates if match is not None and self.is_safe(match, z))

    def with_act(self, norm: fx.Node, z: Any, bn: _Child) -> Iterator[_Match]:
        nodes = [norm]
        user = self.follow(nodes)
        act = self.act(user)
        if user is None or act is None:
            return
        nodes.append(user)
        longer = list(nodes)
        after = self.follow(longer)
        child = self.child(after)
        if after is not None and child is not None:
            longer.append(after)
            if guard.why_stock_conv(child) is None:
                yield _Match(calls.norm_act_conv, [z, bn, act, _Child(str(after.target))], longer, after)
            elif guard.why_stock_max_pool(child) is None:
                yield _Match(calls.norm_act_pool, [z, bn, act], longer, after)
        yield _Match(calls.norm_act, [z, bn, act], nodes, user)

    def with_add(self, norm: fx.Node, z: Any, bn: _Child) -> _Match | None:
        nodes = [norm]
        add = self.follow(nodes)
        if add is None or not self.is_add(add) or add in self.taken:
            return None
        ours, inplace = _args(add).index(nodes[-1]), add.target in _ADD_INPLACE
        if inplace and ours != 0:
            return None  # it writes into the other operand
        other = _args(add)[1 - ours]
        nodes.append(add)
        last, act = add, self.act(self.follow(nodes))
        if act is None:
            nodes, act = nodes[: nodes.index(add) + 1], "identity"
        else:
            last = next(iter(nodes[-1].users))
            nodes.append(last)
        if not self.stand_together(nodes, add, last):
            return None
        if self.is_norm(other) and len(other.users) == 1 and self.is_private(_args(other)[0]):
            operands = [z, bn, _args(other)[0], _Child(str(other.target)), act, inplace]
            return _Match(calls.dual_norm_act, operands, [*nodes, other], last)
        if self.is_norm(other) and len(other.users) == 1 and self.order[other] > self.order[norm]:
            return None  # let the later norm take the add, which stands right behind it
        return _Match(calls.norm_add_act, [z, bn, other, act, inplace], nodes, last)

    def add_match(self, add: fx.Node) -> _Match | None:
        nodes = [add]
        act = self.act(self.follow(nodes))
        if act is None or (add.target in _ADD_INPLACE and not self.is_own_result(_args(add)[0])):
            return None
        last = next(iter(nodes[-1].users))
        nodes.append(last)
        if not self.stand_together(nodes, add, last):
            return None
        return _Match(calls.add_act, [*_args(add), act, add.target in _ADD_INPLACE], nodes, last)

    def is_own_result(self, node: Any) -> bool:
        """A chain of calls with one reader each that starts at a convolution or batch norm: free to overwrite."""
        while isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1:
            if isinstance(self.child(node), (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
                return True
            node = _args(node)[0] if node.args else None
        return False

    def is_safe(self, match: _Match, z: Any) -> bool:
        """The norm may be computed as late as `last`: z cannot change in between."""
        return self.is_private(z) or self.stand_together(match.nodes, match.nodes[0], match.last)

    def stand_together(self, nodes: list[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """Nothing but `nodes` stands between `first` and `last`."""
        inside = {self.order[node] for node in nodes}
        return all(position in inside for position in range(self.order[first], self.order[last] + 1))

    # Replacement.

    def replace(self, match: _Match) -> None:
        with self.graph.inserting_before(match.last):
            arguments = tuple(self.operand(operand) for operand in match.operands)
            call = self.graph.call_function(match.function, arguments)
        match.last.replace_all_uses_with(call)
        self.replaced[match.last] = call
        for node in sorted(match.nodes, key=lambda node: self.order[node], reverse=True):
            if node.op == "call_module":  # also what leaves no operand: a max-pool, an Identity
                self.note(str(node.target))
            self.graph.erase_node(node)

    def operand(self, operand: Any) -> Any:
        if isinstance(operand, fx.Node):
            return self.replaced.get(operand, operand)
        if not isinstance(operand, _Child):
            return operand
        self.note(operand.path)
        return self.graph.create_node("get_attr", operand.path)

    def note(self, path: str) -> None:
        child, result = self.module.get_submodule(path), self.result
        if type(child) is nn.Conv2d:
            result.convs = (*dict.fromkeys((*result.convs, path)),)
        elif type(child) is nn.BatchNorm2d:
            result.norms = (*dict.fromkeys((*result.norms, path)),)
        elif type(child) is nn.MaxPool2d:
            result.pools = (*dict.fromkeys((*result.pools, path)),)
        else:
            result.acts = (*dict.fromkeys((*result.acts, path)),)

    def describe(self, match: _Match) -> str:
        nodes = sorted(match.nodes, key=lambda node: self.order[node])
        return " + ".join(str(getattr(node.target, "__name__", node.target)) for node in nodes)
