"""torchvision and timm as oracles: ``from tests.oracles import torchvision, timm``.

A name that is not installed skips the importing test module with a reason. torchvision's wheel may be one that cannot
load its compiled operators beside this torch (a CUDA wheel beside a CPU torch); its Python half then needs the
operators ``nms`` and ``qnms`` to be declared before it imports.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # kept alive: dropping it removes the declarations


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


def _declare_torchvision_operators() -> None:
    global _library
    if _library is not None or _compiled_operators_load():
        return
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)


def _load(name: str) -> ModuleType:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("oracle torchvision is not installed", allow_module_level=True)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"oracle {name} is not installed", allow_module_level=True)
    _declare_torchvision_operators()
    return importlib.import_module(name)


def __getattr__(name: str) -> ModuleType:
    if name in ("torchvision", "timm"):
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
