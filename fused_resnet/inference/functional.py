"""A captured program without writes into its own tensors.

Networks are full of `relu_` and `add_`. PyTorch can rewrite them, but it takes seconds for a ResNet-50 and takes the
operators apart on the way, so it is asked only where a write could be seen through another tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

# Composite operators whose result is their own memory. Of others one cannot know: dropout returns its input.
_OWN_MEMORY = {
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv1d.default",
    "aten.batch_norm.default",
    "aten.group_norm.default",
    "aten.layer_norm.default",
    "aten.linear.default",
    "aten.matmul.default",
    "aten.max_pool2d.default",
    "aten.adaptive_avg_pool2d.default",
    "aten.relu6.default",
}
_OF_BOOL = {
    "eq", "ne", "gt", "ge", "lt", "le", "not_equal", "greater", "greater_equal", "less", "less_equal", "logical_and",
    "logical_or", "logical_xor", "logical_not",
}  # fmt: skip
_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)


def without_writes(program: ExportedProgram) -> tuple[fx.Graph, ExportedProgram]:
    """The graph with every in-place operator replaced by its plain form, and the program whose signature it has.

    The program given is altered.

    Raises:
        ValueError: it writes to a parameter or buffer of the model.
    """
    _drop_dropouts(program.graph)
    graph = copy.deepcopy(program.graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]  # a copy may have other names
    state = {
        node: spec.target
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True)
        if spec.kind is not InputKind.USER_INPUT
    }
    if not all(_replace(node, state) for node in list(graph.nodes) if _writes(node)):
        program = program.run_decompositions({})
        graph = program.graph
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION or spec.kind is OutputKind.PARAMETER_MUTATION:
            raise _changes(spec.target)
    for node in graph.nodes:
        if _writes(node):
            raise ValueError(f"build_graph: expected operators that can be made functional, got {node.target}")
    return graph, program


def _drop_dropouts(graph: fx.Graph) -> None:
    """In eval mode a dropout returns its input itself; PyTorch would make a copy, which misses later writes."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _DROPOUTS and len(node.args) == 3 and node.args[2] is False:
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user.op != "output")


def _changes(target: str | None) -> ValueError:
    return ValueError(f"build_graph: expected a model that changes nothing in eval mode, got one that changes {target}")


def _writes(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.batch_norm.default:  # its schema does not say so; in training it does
        return bool(node.args[5]) and node.args[3] is not None
    return node.target._schema.is_mutable


def _replace(node: fx.Node, state: Mapping[fx.Node, str | None]) -> bool:
    """Makes one in-place operator functional where nothing else can see its write; False: something might."""
    plain = _plain(node.target)
    written = node.args[0] if node.args else None
    if plain is None or not isinstance(written, fx.Node) or not _same_dtype(node):
        return False
    if written in state:
        raise _changes(state[written])
    if written.op != "placeholder" and not _owns_memory(written):
        return False
    earlier = {user for user in written.users if user < node}
    if not all(_owns_memory(user) for user in earlier):
        return False
    written.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and user not in earlier)
    node.target = plain
    return True


def _plain(target: Any) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`."""
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if not name.endswith("_") or not target._schema.name.startswith("aten::"):
        return None
    found = getattr(getattr(torch.ops.aten, name[:-1], None), overload, None)
    return None if found is None or found._schema.is_mutable else found


def _same_dtype(node: fx.Node) -> bool:
    """A sum of two dtypes has the written tensor's in place, and the wider one's else; a comparison has bool's."""
    if str(node.target).split(".")[1].rstrip("_") in _OF_BOOL:  # aten.gt_.Scalar
        return False
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return len({value.dtype for value in values if isinstance(value, torch.Tensor)}) == 1


def _owns_memory(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    target = node.target
    if str(target) in _OWN_MEMORY:
        return True
    if any(result.alias_info is not None for result in target._schema.returns):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
