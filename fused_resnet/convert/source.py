"""Reads a module's forward and says whether its trace tells the whole truth about it.

torch.fx records what one run of a forward did. That is only what every run does if the forward is a straight line:
child modules, torch functions and tensor methods applied to its inputs, with branches that depend on the module's own
settings alone. This file walks the source with exactly those rules and refuses everything else (loops, branches on
inputs, stores to attributes, calls to unknown functions, constant tensors made on the way), because fx would record
some of them wrongly without noticing. The settings that were read come back, so that a plan made from the trace is
used only while they still have the same values.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

MISSING: Any = object()
_DYNAMIC: Any = object()  # depends on an input or a tensor: only fx knows
_MAX_DEPTH = 8  # of methods calling methods

_PURE_BUILTINS: tuple[Any, ...] = (bool, int, float, str, len, max, min, abs, tuple)
_TRACE_QUERIES = (is_scripting, is_tracing)  # the guard answers these: False
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class NotStraightError(Exception):
    """The forward does something whose trace would not be the whole truth; the message says what."""


def read_forward(module: nn.Module) -> frozenset[str]:
    """Check that `module.forward` is a straight line.

    Returns:
        The names of the module's attributes whose values decide what it does.
    Raises:
        NotStraightError: it is not, or cannot be read.
    """
    if "forward" in module.__dict__:
        raise NotStraightError("its forward was replaced on the instance")
    if type(module).forward is nn.Module.forward:
        raise NotStraightError("its parent is a container that is not called itself")
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.default is not p.empty or p.kind is p.KEYWORD_ONLY for p in parameters):
        raise NotStraightError("its forward has optional inputs")
    reader = _Reader(module)
    reader.function(type(module).forward, {}, 0)
    return frozenset(reader.settings)


def setting(module: nn.Module, name: str) -> Any:
    """The value of a setting in a form that can be compared later.

    A method stands for its function, and whatever is no plain value for its class: a module, or a tensor in the place
    of a number.
    """
    value = getattr(module, name, MISSING)
    if value is None or value is MISSING or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, MethodType):
        return value.__func__
    return value if callable(value) and not isinstance(value, nn.Module) else type(value)


def count_inputs(module: nn.Module) -> int:
    """How many inputs a straight forward takes, all of them required."""
    return len(inspect.signature(type(module).forward).parameters) - 1


class _Reader:
    """Walks the live path of a forward and of the methods it calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.settings: set[str] = set()

    def function(self, function: Any, given: dict[str, Any], depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise NotStraightError("its methods call each other too deeply")
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            raise NotStraightError("its forward, or a method it calls, is not a plain function")
        if function.__closure__:
            raise NotStraightError(f"{function.__name__} uses variables of an enclosing function, or super()")
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError) as error:
            raise NotStraightError(f"the source of {function.__name__} is not available") from error
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
            raise NotStraightError(f"{function.__name__} is decorated or not a plain function")
        frame = _Frame(self, function.__globals__, self.arguments(function, given), depth)
        frame.block(tree.body)
        return frame.result

    def arguments(self, function: FunctionType, given: dict[str, Any]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for index, parameter in enumerate(inspect.signature(function).parameters.values()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise NotStraightError(f"{function.__name__} takes *{parameter.name}")
            if index == 0:
                names[parameter.name] = self.module
            elif parameter.name in given:
                names[parameter.name] = given[parameter.name]
            else:
                names[parameter.name] = _DYNAMIC if parameter.default is parameter.empty else parameter.default
        return names


class _Frame:
    """One function's statements in order; `names` holds what is known of each local."""

    def __init__(self, reader: _Reader, scope: dict[str, Any], names: dict[str, Any], depth: int) -> None:
        self.reader, self.scope, self.names, self.depth = reader, scope, names, depth
        self.result: Any = None

    def block(self, statements: list[ast.stmt]) -> bool:
        """Walk; True when a return was reached."""
        return any(self.statement(statement) for statement in statements)

    def statement(self, node: ast.stmt) -> bool:
        match node:
            case ast.Return(value=value):
                self.result = None if value is None else self.value(value)
                return True
            case ast.Assign(targets=targets, value=value):
                known = self.value(value)
                for target in targets:
                    self.assign(target, known)
            case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                operands = self.names.get(name, _DYNAMIC), self.value(value)
                self.names[name] = self.binary(node.op, *operands)
            case ast.Expr(value=value):
                self.value(value)
            case ast.If(test=test, body=body, orelse=orelse):
                return self.block(body if self.decision(test) else orelse)
            case ast.Assert(test=test):
                self.decision(test)
            case ast.Pass():
                pass
            case _:
                raise NotStraightError(f"its forward has a {_statement_name(node)}")
        return False

    def assign(self, target: ast.expr, known: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = known
        elif isinstance(target, ast.Tuple) and all(isinstance(item, ast.Name) for item in target.elts):
            for item in target.elts:
                assert isinstance(item, ast.Name)
                self.names[item.id] = _DYNAMIC
            if known is not _DYNAMIC:
                raise NotStraightError("its forward unpacks a setting")
        else:
            raise NotStraightError(f"its forward stores to {ast.unparse(target)}")

    def decision(self, test: ast.expr) -> bool:
        known = self.value(test)
        if known is _DYNAMIC:
            raise NotStraightError(f"it branches on its input ({ast.unparse(test)})")
        if isinstance(known, nn.Module) and hasattr(known, "__len__"):
            raise NotStraightError(f"it branches on the length of {ast.unparse(test)}")
        return bool(known)

    def value(self, node: ast.expr) -> Any:
        """What is known of an expression: its value, or _DYNAMIC."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.names[name] if name in self.names else self.global_(name)
            case ast.Attribute(value=base, attr=attr):
                return self.attribute(self.value(base), attr, record=True)
            case ast.Call():
                return self.call(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self.decision(operand)
            case ast.UnaryOp(op=op, operand=operand):
                known = self.value(operand)
                return -known if isinstance(op, ast.USub) and known is not _DYNAMIC else _DYNAMIC
            case ast.BoolOp(op=op, values=values):
                for item in values[:-1]:
                    if self.decision(item) is isinstance(op, ast.Or):
                        return isinstance(op, ast.Or)
                return self.value(values[-1])
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.compare(op, self.value(left), self.value(right), node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.decision(test) else orelse)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                known = [self.value(item) for item in items]
                return _DYNAMIC if any(_is_dynamic(item) for item in known) else tuple(known)
            case ast.Subscript(value=base, slice=index):
                return self.subscript(self.value(base), index)
            case ast.Slice(lower=lower, upper=upper, step=step):
                for bound in (lower, upper, step):
                    if bound is not None:
                        self.value(bound)
                return _DYNAMIC
        raise NotStraightError(f"its forward has the expression {ast.unparse(node)}")

    def global_(self, name: str) -> Any:
        value = self.scope.get(name, MISSING)
        if value is MISSING:
            builtins = self.scope["__builtins__"]
            value = (builtins if isinstance(builtins, dict) else vars(builtins)).get(name, MISSING)
        if not isinstance(value, ModuleType) and not callable(value):
            raise NotStraightError(f"its forward reads the global {name}")
        return value

    def attribute(self, base: Any, attr: str, *, record: bool) -> Any:
        if base is _DYNAMIC:
            return _DYNAMIC
        if isinstance(base, ModuleType):
            return getattr(base, attr, MISSING)
        if base is not self.reader.module:
            if isinstance(base, nn.Module) and isinstance(getattr(base, attr, None), (nn.Module, Tensor)):
                value = getattr(base, attr)
                return _DYNAMIC if isinstance(value, Tensor) else value
            raise NotStraightError(f"its forward reads .{attr} of a {type(base).__name__}")
        if isinstance(inspect.getattr_static(type(base), attr, None), (property, functools.cached_property)):
            raise NotStraightError(f"its forward reads the property {attr}")
        value = getattr(base, attr, MISSING)
        if isinstance(value, Tensor):
            return _DYNAMIC  # fx records parameters and buffers by name
        if isinstance(value, MethodType):
            self.reader.settings.add(attr)
            return value
        if record:
            if not (value is None or isinstance(value, (bool, int, float, str, nn.Module)) or value is MISSING):
                raise NotStraightError(f"its forward reads self.{attr}, a {type(value).__name__}")
            self.reader.settings.add(attr)
        elif callable(value) and not isinstance(value, nn.Module):
            self.reader.settings.add(attr)  # a function that the module holds
        return value

    def subscript(self, base: Any, index: ast.expr) -> Any:
        known = self.value(index)
        if base is _DYNAMIC:
            return _DYNAMIC
        if isinstance(base, tuple) and isinstance(known, int):
            return base[known]
        raise NotStraightError(f"its forward takes an item of a {type(base).__name__}")

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if _is_dynamic(left) or _is_dynamic(right):
            return _DYNAMIC
        if type(op) not in _BINARY:
            raise NotStraightError(f"its forward uses the operator {type(op).__name__}")
        return _BINARY[type(op)](left, right)

    def compare(self, op: ast.cmpop, left: Any, right: Any, node: ast.expr) -> Any:
        if not _is_dynamic(left) and not _is_dynamic(right):
            return _COMPARE[type(op)](left, right)
        if isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
            raise NotStraightError(f"it branches on its input ({ast.unparse(node)})")
        return _DYNAMIC

    def call(self, node: ast.Call) -> Any:
        if any(isinstance(arg, ast.Starred) for arg in node.args) or any(k.arg is None for k in node.keywords):
            raise NotStraightError(f"its forward passes unknown arguments ({ast.unparse(node)})")
        if isinstance(node.func, ast.Attribute):
            base = self.value(node.func.value)
            function = self.attribute(base, node.func.attr, record=False)
        else:
            base, function = None, self.value(node.func)
        args = [self.value(arg) for arg in node.args]
        named = {str(k.arg): self.value(k.value) for k in node.keywords}
        dynamic = any(_is_dynamic(arg) for arg in (*args, *named.values()))
        if function is _DYNAMIC:  # a tensor's method, or a parameter's
            return _DYNAMIC
        if isinstance(function, nn.Module) and dynamic:
            return _DYNAMIC
        if isinstance(function, MethodType) and function.__self__ is self.reader.module:
            return self.method(function, args, named)
        if any(function is query for query in _TRACE_QUERIES):
            return False
        if function in (getattr, hasattr) and args and args[0] is self.reader.module and not dynamic:
            value = self.attribute(args[0], args[1], record=True)
            if function is hasattr:
                return value is not MISSING
            return args[2] if value is MISSING and len(args) > 2 else value
        if any(function is pure for pure in _PURE_BUILTINS) and not dynamic:
            if any(isinstance(arg, nn.Module) for arg in args):
                raise NotStraightError(f"its forward depends on {ast.unparse(node)}")
            return function(*args, **named)
        if _is_torch_function(function) and dynamic:
            return _DYNAMIC
        raise NotStraightError(f"its forward calls {ast.unparse(node.func)}")

    def method(self, method: MethodType, args: list[Any], named: dict[str, Any]) -> Any:
        try:
            bound = inspect.signature(method).bind(*args, **named)
        except TypeError as error:
            raise NotStraightError(f"its forward calls {method.__name__} with wrong arguments") from error
        return self.reader.function(method.__func__, dict(bound.arguments), self.depth + 1)


def _is_dynamic(known: Any) -> bool:
    return known is _DYNAMIC or (isinstance(known, tuple) and any(_is_dynamic(item) for item in known))


def _is_torch_function(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return function is not MISSING and (getattr(F, name, None) is function or getattr(torch, name, None) is function)


def _statement_name(node: ast.stmt) -> str:
    names = {ast.For: "for loop", ast.While: "while loop", ast.With: "with block", ast.Try: "try block"}
    return names.get(type(node), f"{type(node).__name__} statement")
