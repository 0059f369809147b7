"""Says of every unit of a model whether it runs fused, and why not."""

from typing import Any, NamedTuple

import torch
from torch import nn

from fused_resnet.nn.guard import (
    FusedUnit,
    observed,
    why_stock,
    why_stock_conv,
    why_stock_downsample,
    why_stock_max_pool,
)

LEFT = "_left_stock"  # attribute of a converted model: the paths of the norms that stay stock, and why
_OUTSIDE = "not part of a unit that this package can fuse"


class Row(NamedTuple):
    """One line of the table."""

    path: str  # as in named_modules(); the model itself is "(model)"
    unit: str  # class name
    fused: bool
    why: str  # empty when fused without exception


class Explanation(tuple[Row, ...]):
    """The rows; prints as a table, with the totals below."""

    def __str__(self) -> str:
        head = ("module", "unit", "path", "why")
        lines = [head, *((r.path, r.unit, "fused" if r.fused else "stock", r.why) for r in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        text = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        ]
        text.insert(1, "-" * max(map(len, text)))
        text.append(f"{self.fused} of {len(self)} units fused")
        return "\n".join(text)

    __repr__ = __str__

    @property
    def fused(self) -> int:
        """How many units run fused."""
        return sum(row.fused for row in self)


def explain(model: nn.Module, example_input: Any = None) -> Explanation:
    """Says of every unit whether it runs fused or stock, and why.

    Args:
        model: any module. Batch norms outside the units of this package are listed as stock.
        example_input: one tensor, or a tuple of arguments: the model then runs once with it, in evaluation mode and
            without gradients, and each unit is asked about the tensors that reach it (autocast and mixed devices
            included). Without it, units are only asked about what does not depend on the input.

    Returns:
        A tuple of rows (path, unit, fused, why) that prints as a table. Nothing of the model is changed.
    """
    units = {path: module for path, module in model.named_modules() if isinstance(module, FusedUnit)}
    reasons = {path: _why_overridden(unit) or why_stock(unit) for path, unit in units.items()}
    if example_input is not None:
        reasons.update(_reasons_while_running(model, units, example_input))
    left: dict[str, str] = model.__dict__.get(LEFT, {})
    rows = []
    covered: set[int] = set()
    for path, module in model.named_modules():
        if path in units:
            covered.update(id(child) for child in read_children(units[path]))
            reason = reasons[path]
            why = _exceptions(units[path]) if reason is None else reason
            rows.append(Row(path or "(model)", type(module).__name__, reason is None, why))
        elif path in left or (isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in covered):
            rows.append(Row(path or "(model)", type(module).__name__, False, left.get(path, _OUTSIDE)))
    return Explanation(rows)


def read_children(unit: FusedUnit) -> list[nn.Module]:
    """The children that a unit reads, and does not call, while it runs fused."""
    own = unit.read_children()
    if own is not None:
        return own
    names = (*unit.fused_convs, *unit.fused_norms, *unit.fused_relus)
    children = [child for name in names if (child := unit._modules.get(name)) is not None]
    downsample = unit._modules.get("downsample")
    if downsample is not None:
        children += downsample.modules()
    return children


def _exceptions(unit: FusedUnit) -> str:
    """What a fused unit still calls."""
    own = unit.exceptions()
    if own is not None:
        return own
    downsample, pool = unit._modules.get("downsample"), unit._modules.get("maxpool")
    reason = None
    if pool is not None:
        reason = why_stock_max_pool(pool)
        return "" if reason is None else f"but maxpool is called: it {reason}"
    if downsample is not None:
        reason = why_stock_conv(downsample) and why_stock_downsample(downsample)
    return "" if reason is None else f"but the shortcut is called: {reason}"


def _why_overridden(unit: FusedUnit) -> str | None:
    owner = next(cls for cls in type(unit).__mro__ if "forward" in cls.__dict__)
    if "forward" in unit.__dict__ or not owner.__module__.startswith(f"{__package__.partition('.')[0]}."):
        return "its forward is not this package's"
    return None


def _reasons_while_running(model: nn.Module, units: dict[str, FusedUnit], example_input: Any) -> dict[str, str | None]:
    paths = {id(unit): path for path, unit in units.items()}
    reasons: dict[str, str | None] = {}

    def note(unit: FusedUnit, reason: str | None) -> None:
        if id(unit) in paths:
            reasons[paths[id(unit)]] = reason

    modes = [(module, module.training) for module in model.modules()]
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        model.eval()
        with torch.no_grad(), observed(note):
            model(*arguments)
    finally:
        for module, training in modes:
            module.training = training
    return reasons
