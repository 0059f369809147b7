"""Networks by name, as they stand on the command line and in checkpoints."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import cache

from torch import nn

from fused_resnet import models
from fused_resnet.models import cifar, plain, preact
from fused_resnet.train.errors import OptionError

_MODULES = (("", models), ("plain.", plain), ("cifar.", cifar), ("preact.", preact))


@cache
def constructors() -> dict[str, Callable[..., nn.Module]]:
    """Every network of the package: "resnet50", "plain.plain34", "cifar.resnet20", "preact.preresnet18", ..."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for prefix, module in _MODULES:
        for name, function in vars(module).items():
            # A constructor is a public function whose name says a depth.
            if inspect.isfunction(function) and re.fullmatch(r"[a-z]\w*\d\w*", name):
                found.setdefault(prefix + name, function)
    return found


def build(name: str, num_classes: int) -> nn.Module:
    """A network with fresh weights (torch's global generator decides them)."""
    check(name)
    return constructors()[name](num_classes=num_classes)


def check(name: str) -> None:
    """Raises OptionError for an unknown name, with the nearest known ones."""
    known = constructors()
    if name not in known:
        by_tail = [full for full in known if full.partition(".")[2] == name]
        near = by_tail or difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise OptionError(f"--model {name}: unknown; {hint}")
