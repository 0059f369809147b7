"""`fused_resnet.convert`: walks a model and gives every module that can have one a fused forward."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from fused_resnet.convert.graph import looks_into
from fused_resnet.convert.source import NotStraightError
from fused_resnet.convert.unit import ConvertedUnit, convert_module
from fused_resnet.nn.explain import LEFT, explain, read_children
from fused_resnet.nn.guard import FusedUnit, why_stock_norm

Model = TypeVar("Model", bound=nn.Module)

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def convert(model: Model, *, inplace: bool = False, verbose: bool = False) -> Model:
    """Fuse the batch norms of a model that someone already has with what stands around them.

    Every module that calls `nn.BatchNorm2d` children gets a fused forward, whoever wrote it: torchvision's and timm's
    ResNets in all their variants, Sequentials, blocks of one's own. Its forward is read and traced one level deep;
    that is done only where the trace is the whole truth, that is, where the forward is a straight line of children,
    torch functions and tensor methods, with branches on the module's own settings alone. Everything else stays stock
    and untouched: other norms, loops, forwards that look at their inputs, store attributes or call other functions.

    Children, their names, state_dict keys, `isinstance`, methods and hooks stay as they are; `deepcopy`, pickle (also
    of the whole model), `torch.compile`, train and eval work as before. A module goes back to its original forward by
    itself, on every call anew, when a fused child got a hook or was replaced (`convert_sync_batchnorm`, pruning,
    quantisation, parametrisation), when a setting that its branches read has changed, and in every other case of
    `fused_resnet.nn.explain`. torch.jit.script compiles the original forwards.

    Args:
        model: any module; its mode, device and dtype do not matter.
        inplace: convert this model; else a deep copy, and `model` stays as it is.
        verbose: print a table of what was fused and what was left, and why. `fused_resnet.nn.explain(model)` returns
            the same table at any later time.
    Returns:
        The converted model; numbers are those of the original within the rounding of its dtype.
    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected model to be a torch.nn.Module, got {type(model).__name__}")
    result = model if inplace else copy.deepcopy(model)
    refusals = {path: why for path, module in _candidates(result) if (why := _try(module)) is not None}
    left = _left(result, refusals)
    if left or LEFT in result.__dict__:
        result.__dict__[LEFT] = left
    if verbose:
        print(explain(result))
    return result


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that call batch norms themselves, children before parents, less what is fused already."""
    fused = _fused_children(model)
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        calls_norms = any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) and id(part) not in fused
            for child in module.children()
            for part in (child.children() if looks_into(child) else (child,))
        )
        if calls_norms and not isinstance(module, FusedUnit):
            found.append((path, module))
    return found[::-1]


def _fused_children(model: nn.Module) -> set[int]:
    units = [unit for unit in model.modules() if isinstance(unit, FusedUnit)]
    return {id(child) for unit in units for child in read_children(unit)}


def _try(module: nn.Module) -> str | None:
    """Convert one module; what hinders it, as a reason."""
    try:
        convert_module(module)
    except NotStraightError as refusal:
        return str(refusal)
    return None


def _left(model: nn.Module, refusals: dict[str, str]) -> dict[str, str]:
    """Every norm that stays stock, by path, and why."""
    fused = _fused_children(model)
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, _NORMS) or isinstance(module, FusedUnit) or id(module) in fused:
            continue
        parent = path.rpartition(".")[0]
        of_itself = why_stock_norm(module)
        why = f"it {of_itself}" if of_itself is not None else refusals.get(parent)
        if why is None:
            unit = model.get_submodule(parent)
            plan = unit.plan() if isinstance(unit, ConvertedUnit) else None
            why = dict(plan.left).get(path.rpartition(".")[2]) if plan is not None else None
        left[path] = why or "its parent does not call it in a way that can be fused"
    return left
