"""Fused training and inference of ResNets for PyTorch: the same models and numbers, faster."""

import importlib
from typing import TYPE_CHECKING, Any

from fused_resnet._extension import available as is_available
from fused_resnet._extension import build_info
from fused_resnet._version import __version__

if TYPE_CHECKING:
    from fused_resnet import models, nn, ops

__all__ = ["__version__", "build_info", "convert", "is_available", "models", "nn", "ops"]

is_available()  # load the extension now, so that what is wrong with it is said at import

# Not on demand: whoever imported the package `convert` first would find the package here, and not the function.
from fused_resnet.convert import convert  # noqa: E402


def __getattr__(name: str) -> Any:
    if name in ("ops", "nn", "models", "testing", "train"):
        return importlib.import_module(f"fused_resnet.{name}")
    raise AttributeError(f"module 'fused_resnet' has no attribute {name!r}")
