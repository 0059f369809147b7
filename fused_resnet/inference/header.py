"""A graph as values for JSON, and back; every field is held to the type that the graph's dataclasses give it.

A step is an object with its class name under "step". Among the arguments of a stock step a list is a tuple, and an
object is what JSON has no form for: {"value": 3}, {"tensor": "fc.weight"}, {"float": "-inf"}.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from fused_resnet.inference import graph as g

_STEPS: dict[str, type[g.Step]] = {
    step.__name__: step
    for step in (
        g.Conv, g.Linear, g.Affine, g.Add, g.Act, g.MaxPool, g.AvgPool, g.GlobalAvgPool, g.Flatten, g.Stock,
    )
}  # fmt: skip
_FIELD_TYPES: dict[Any, dict[str, Any]] = {cls: get_type_hints(cls) for cls in (*_STEPS.values(), g.Activation)}
_GRAPH_FIELDS = ("steps", "input", "outputs", "structure", "channels", "extent", "batch")
_LARGEST = 2**63


def encode_graph(graph: g.Graph) -> dict[str, Any]:
    """All of a graph but the contents of its tensors."""
    fields: dict[str, Any] = {name: getattr(graph, name) for name in _GRAPH_FIELDS}
    structure = graph.structure
    fields["structure"] = list(structure) if isinstance(structure, tuple) else structure
    for name in ("outputs", "extent"):
        fields[name] = _encode(fields[name])
    fields["steps"] = [{"step": type(step).__name__, **_encode_fields(step)} for step in graph.steps]
    return fields


def decode_graph(fields: Any, tensors: Mapping[str, Tensor]) -> g.Graph:
    """The graph with these tensors; nothing but the types is checked.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    given = _object("the graph", fields, _GRAPH_FIELDS)
    if not isinstance(given["steps"], list):
        raise _unexpected("the graph's steps", "a list", given["steps"])
    hints = get_type_hints(g.Graph)
    values = {
        name: _decode(hints[name], given[name], f"the graph's {name}")
        for name in _GRAPH_FIELDS
        if name not in ("steps", "structure")
    }
    return g.Graph(
        steps=tuple(_decode_step(index, step) for index, step in enumerate(given["steps"])),
        structure=_decode_structure(given["structure"]),
        tensors=tensors,
        **values,
    )


def _encode_fields(value: Any) -> dict[str, Any]:
    return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _encode(value: Any) -> Any:
    if isinstance(value, g.Reference):
        return {"tensor" if isinstance(value.to, str) else "value": value.to}
    if isinstance(value, g.Activation):
        return _encode_fields(value)
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decode_step(index: int, given: Any) -> g.Step:
    kind = given.get("step") if isinstance(given, dict) else None
    cls = _STEPS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _unexpected(f"step {index}", f"one of {', '.join(_STEPS)}", kind)
    hints = _FIELD_TYPES[cls]
    values = _object(f"step {index} ({kind})", given, ("step", *hints))
    return cls(**{name: _decode(hint, values[name], f"step {index} ({kind}): {name}") for name, hint in hints.items()})


def _decode_structure(value: Any) -> str | tuple[str, ...] | None:
    if value is None or value in ("tuple", "list"):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
        raise _unexpected("the graph's structure", "none, tuple, list or a list of keys", value)
    return tuple(value)


def _decode(hint: Any, value: Any, what: str) -> Any:
    if hint is Any:
        return _decode_argument(value, what)
    if hint is float:
        return float(_number(value, what))
    if hint in _EXACT:
        return _EXACT[hint](value, what)
    if hint is g.Activation:
        types = _FIELD_TYPES[hint]
        given = _object(what, value, tuple(types))
        return hint(**{name: _decode(kind, given[name], f"{what}.{name}") for name, kind in types.items()})
    arguments = get_args(hint)
    if type(None) in arguments:
        return None if value is None else _decode(arguments[0], value, what)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            length = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
            raise _unexpected(what, f"a list{length}", value)
        return tuple(_decode(arguments[0], item, what) for item in value)
    if not isinstance(value, dict):
        raise _unexpected(what, "an object", value)
    return {key: _decode_argument(item, what) for key, item in value.items()}


def _decode_argument(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list):
        return tuple(_decode_argument(item, what) for item in value)
    if isinstance(value, dict):
        ((key, item),) = value.items() if len(value) == 1 else ((None, None),)
        if key == "value":
            return g.Reference(_integer(item, what))
        if key == "tensor":
            return g.Reference(_string(item, what))
        if key == "float" and item in ("inf", "-inf", "nan"):
            return float(item)
        raise _unexpected(what, "a value, a tensor or a float", value)
    return _number(value, what)


def _string(value: Any, what: str) -> str:
    if type(value) is not str:
        raise _unexpected(what, "a string", value)
    return value


def _boolean(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise _unexpected(what, "true or false", value)
    return value


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or abs(value) >= _LARGEST:
        raise _unexpected(what, "a whole number of 64 bits", value)
    return value


def _number(value: Any, what: str) -> int | float:
    if type(value) is not float:
        return _integer(value, what)
    if not math.isfinite(value):
        raise _unexpected(what, "a finite number", value)
    return value


_EXACT: dict[Any, Callable[[Any, str], Any]] = {str: _string, bool: _boolean, int: _integer}


def _object(what: str, value: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """Checks that `value` has these fields and no others."""
    if not isinstance(value, dict) or set(value) != set(fields):
        got = sorted(map(str, value)) if isinstance(value, dict) else value
        raise _unexpected(what, f"an object of {', '.join(fields)}", got)
    return value


def _unexpected(what: str, expected: str, got: Any) -> ValueError:
    text = repr(got)
    return ValueError(f"{what}: expected {expected}, got {text if len(text) < 100 else text[:100] + '...'}")
