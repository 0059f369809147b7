"""A module in eval mode as a list of PyTorch operators, with the sizes at which that list is the whole truth.

Batch and extent are captured as unknowns. Python code of the network that branches on one of them was followed on one
side only, so such a size is fixed to the example's, as is one at which PyTorch itself ends up with a constant.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from fused_resnet.inference.functional import without_writes
from fused_resnet.inference.operators import name_of
from fused_resnet.nn.guard import stock

_BATCH, _ROWS, _COLUMNS = 0, 2, 3
# Which sizes are unknowns, first what is most useful.
_FREE_SIZES = ((_BATCH, _ROWS, _COLUMNS), (_BATCH,), ())
_DEFAULT_EXTENTS = (224, 32)
_DEFAULT_BATCH = 2
_SMALL_EXTENT = 64  # a trial at this size is quick
_TORCH = str(Path(torch.__file__).parent) + os.sep  # and not torchvision
# Where a branch on a size is seen when the code that takes it has no file of its own.
_CALLERS = str(Path(nn.__file__).parent / "modules") + os.sep
_exporting = threading.RLock()
_FILE = re.compile(r'file "?([^",]+)"?, line', re.IGNORECASE)


@dataclass(frozen=True)
class Captured:
    """
    Attributes:
        graph: operators without writes.
        input: the node of the images.
        outputs: what it returns, nodes or constants.
        structure: as in `Graph`.
        tensors: what the other placeholders stand for: a name in the model and the model's own tensor.
        dtype: of the model.
        channels, extent, batch: as in `Graph`.
        example: the shape it was captured at.
    """

    graph: fx.Graph
    input: fx.Node
    outputs: tuple[Any, ...]
    structure: str | tuple[str, ...] | None
    tensors: Mapping[fx.Node, tuple[str, Tensor]]
    dtype: torch.dtype
    channels: int
    extent: tuple[int, int] | None
    batch: int | None
    example: tuple[int, ...]

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of the graph's tensors: narrower ones are widened, which is exact."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def capture(model: nn.Module, example_input: Tensor | None) -> Captured:
    """See `capture.build_graph`, which says what is refused."""
    model = _inner(model)
    _check_model(model)
    # torch.export is for one thread at a time, and would take what autocast does for the network's own doing.
    with _exporting, torch.no_grad(), stock(), torch.autocast(_device(model).type, enabled=False):
        return _capture(model, example_input)


def _capture(model: nn.Module, example_input: Tensor | None) -> Captured:
    dtype = _dtype(model)
    failure: Exception | None = None
    for shape in _shapes(model, example_input):
        example = torch.zeros(shape, dtype=dtype, device=_device(model))
        for free in _FREE_SIZES:
            try:
                program = _export(model, example, free)
            except Exception as error:
                failure = failure or error
                continue
            if free and (_branches_on_a_size(program) or _computes_beyond_steps(program)):
                continue
            captured = _read(program, shape, dtype)
            if captured.batch is None and not _takes_one_image(model, captured):
                continue
            if captured.batch is not None and example_input is None:
                raise ValueError("build_graph: expected example_input, because the model runs at one batch size only")
            return captured
    raise ValueError(
        f"build_graph: expected a model that torch.export can capture, got {type(model).__name__}: {failure}"
    ) from failure


def _inner(model: nn.Module) -> nn.Module:
    """The network in what only says how it is to be run."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_graph: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("build_graph: expected a model in eval mode, got one in training mode: call model.eval()")
    for name, module in model.named_modules():
        if module.training and not _same_in_training(module):
            raise ValueError(
                f"build_graph: expected a model in eval mode, got {name!r} ({type(module).__name__}) in training mode: "
                "call model.eval()"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"build_graph: expected a model with values, got {name!r} on the meta device")
        if tensor.is_floating_point() and (tensor.dtype is torch.float64) != (_dtype(model) is torch.float64):
            raise ValueError(f"build_graph: expected one precision, got {_dtype(model)} and {name!r} of {tensor.dtype}")


def _same_in_training(module: nn.Module) -> bool:
    """A layer that was put into a model after its `eval()` is harmless if it is one of these."""
    depends = (
        nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase
    )  # fmt: skip
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, depends)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point()), torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def _shapes(model: nn.Module, example_input: Tensor | None) -> list[tuple[int, ...]]:
    if example_input is not None:
        if not isinstance(example_input, Tensor):
            raise TypeError(
                f"build_graph: expected example_input to be a tensor (N, C, H, W), got {type(example_input).__name__}"
            )
        if example_input.dim() != 4 or not example_input.is_floating_point() or 0 in example_input.shape:
            raise ValueError(
                "build_graph: expected example_input to be a floating-point tensor (N, C, H, W) that is not empty, got "
                f"{example_input.dtype} {tuple(example_input.shape)}"
            )
        return [tuple(example_input.shape)]
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("build_graph: expected example_input, because the model has no Conv2d that tells the channels")
    return [(_DEFAULT_BATCH, conv.in_channels, extent, extent) for extent in _DEFAULT_EXTENTS]


def _export(model: nn.Module, example: Tensor, free: Sequence[int]) -> ExportedProgram:
    # A batch of one would be captured as a constant.
    if _BATCH in free and example.shape[_BATCH] == 1:
        example = torch.zeros((_DEFAULT_BATCH, *example.shape[1:]), dtype=example.dtype, device=example.device)
    dims = {dim: Dim.AUTO for dim in free if example.shape[dim] > 1}
    return torch.export.export(model, (example,), dynamic_shapes=(dims,), strict=False)


def _takes_one_image(model: nn.Module, captured: Captured) -> bool:
    """Whether the program is the network's at a batch of one too: to torch.export, unknown sizes are 2 and more."""
    if any(_is_random(node) or node.op == "get_attr" for node in captured.graph.nodes):
        return True  # two runs differ anyhow; and a part that is a graph itself is refused later
    # The network's forward may change its attributes; parameters need no copies.
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    extent = captured.example[2:]
    small = extent if captured.extent is not None else tuple(min(size, _SMALL_EXTENT) for size in extent)
    source = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    for size in dict.fromkeys((small, extent)):
        images = torch.randn((1, captured.channels, *size), generator=source, device="cpu")
        images = images.to(_device(model), captured.dtype)
        try:
            expected = tree_leaves(model(images))
            break
        except Exception:  # whatever a network may raise that wants larger images
            continue
    else:
        return True  # it has no answer that could be another
    run = fx.Interpreter(fx.GraphModule(nn.Module(), captured.graph), garbage_collect_values=False)
    given = {captured.input: images} | {node: tensor for node, (_, tensor) in captured.tensors.items()}
    try:
        run.run(*(given[node] for node in captured.graph.nodes if node.op == "placeholder"))
    except Exception:  # whatever an operator may raise at a size that was not thought of
        return False
    got = [run.env[output] if isinstance(output, fx.Node) else output for output in captured.outputs]
    return len(expected) == len(got) and all(map(_alike, expected, got))


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape:
        return False
    wide, other = a.double(), b.double()
    size = float(wide.nan_to_num(0, 0, 0).abs().max()) if wide.numel() else 0.0
    error = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1
    return torch.allclose(wide, other, rtol=error, atol=error * size, equal_nan=True)


def _placeholder(program: ExportedProgram) -> fx.Node:
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    assert len(names) == 1
    node: fx.Node = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == names[0])
    return node


def _branches_on_a_size(program: ExportedProgram) -> bool:
    """Whether the network's own code, and not PyTorch's, asked something about a size that was to be unknown."""
    for size in _placeholder(program).meta["val"].shape:
        if isinstance(size, torch.SymInt):
            return any(_is_of_the_network(guard) for guard in size.node.shape_env.guards)
    return False


def _computes_beyond_steps(program: ExportedProgram) -> bool:
    """Whether sizes are computed with functions that no step can hold."""
    scalars = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(
        node.op == "call_function" and isinstance(node.meta.get("val"), scalars) and name_of(node.target) is None
        for node in program.graph.nodes
    )


def _is_of_the_network(guard: Any) -> bool:
    found = _FILE.search(str(getattr(getattr(guard, "sloc", None), "framework_loc", "")))
    return found is None or not found[1].startswith(_TORCH) or found[1].startswith(_CALLERS)


def _read(program: ExportedProgram, example: tuple[int, ...], dtype: torch.dtype) -> Captured:
    sizes = _placeholder(program).meta["val"].shape
    fixed = [not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None for size in sizes]
    structure = _structure(program)
    graph, program = without_writes(program)
    signature = program.graph_signature
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]  # a copy may have other names
    returned = next(iter(reversed(graph.nodes))).args[0]
    outputs = [
        node for node, spec in zip(returned, signature.output_specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT
    ]
    tensors: dict[fx.Node, tuple[str, Tensor]] = {}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            images = node
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            held = program.state_dict.get(spec.target)
            tensor = program.constants[spec.target] if held is None else held
            tensors[node] = (spec.target, tensor.detach())
        else:
            raise ValueError(
                f"build_graph: expected tensors as the model's state, got {spec.target!r} ({spec.kind.name})"
            )
    return Captured(
        graph=graph,
        input=images,
        outputs=tuple(outputs),
        structure=structure,
        tensors=tensors,
        dtype=dtype,
        channels=example[1],
        extent=(example[_ROWS], example[_COLUMNS]) if fixed[_ROWS] or fixed[_COLUMNS] else None,
        batch=int(sizes[_BATCH]) if fixed[_BATCH] else None,
        example=example,
    )


def _structure(program: ExportedProgram) -> str | tuple[str, ...] | None:
    spec = program.call_spec.out_spec
    assert spec is not None
    if spec.is_leaf():
        return None
    if all(child.is_leaf() for child in spec.children()):
        if spec.type in (tuple, list):
            return str(spec.type.__name__)
        if isinstance(spec.type, type) and issubclass(spec.type, dict):
            keys = tuple(spec.context)
            if all(isinstance(key, str) for key in keys):
                return keys
    raise ValueError(
        "build_graph: expected a model that returns a tensor, or a tuple, list or dict of tensors, "
        f"got one that returns {spec}"
    )
