"""Loads the compiled extension once, and says in one sentence why it could not be loaded.

Without it the package works on stock PyTorch. The reasons: disabled by FUSED_RESNET_DISABLE, not built, built for
another torch (found out from `_C.json` before loading, because loading it may crash), or broken.
"""

import importlib
import json
import re
import warnings
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fused_resnet import _env
from fused_resnet._version import __version__

_BUILD_CONFIG = Path(__file__).with_name("_C.json")
_REBUILD = "reinstall fused_resnet ('pip install --force-reinstall --no-deps .' in its source tree)"


class _Loaded(NamedTuple):
    module: ModuleType | None
    reason: str | None  # None exactly when the module is there


def available() -> bool:
    """Whether the compiled extension is in use."""
    return _load().module is not None


def why_unavailable() -> str | None:
    """One sentence, or None when the extension is in use."""
    return _load().reason


def extension() -> ModuleType:
    """The module `fused_resnet._C`.

    Raises:
        RuntimeError: it is unavailable; the message is `why_unavailable()`.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def why_no_cuda(index: int = 0) -> str | None:
    """Why CUDA tensors take the stock path: one sentence, or None when device `index` runs the fused kernels.

    The answer is remembered, unless it is an error of the device's that may pass.
    """
    try:
        return _why_no_cuda(index)
    except RuntimeError as error:
        return str(error).partition("\n")[0]


@cache  # of what is returned, not of what is raised
def _why_no_cuda(index: int) -> str | None:
    module, reason = _load()
    if module is None:
        return reason
    if torch.version.cuda is None:
        cause = f"torch {torch.__version__} has no CUDA"
    elif not torch.cuda.is_available():
        cause = "torch sees no GPU"
    elif not module.build_config()["cuda"]:
        cause = f"its extension was built without CUDA; to get the kernels, put nvcc on PATH and {_REBUILD}"
    elif index >= torch.cuda.device_count():
        cause = f"torch sees no cuda:{index}"
    else:
        status: str | None = module.why_no_cuda(index)
        return status
    return f"fused_resnet has no kernels for cuda:{index} because {cause}."


def pick_device(name: str = "auto", *, stock: bool = False) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here.

    "auto" is the first GPU, or the CPU where there is none, or none that the fused kernels can use; the latter with a
    warning. With `stock` (no fused kernels are wanted), or without the extension, any GPU will do.

    Raises:
        ValueError: no such device; the message begins with `name`.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is None:
        raise ValueError(f"{name}: must be auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        reason = None if stock or not available() else why_no_cuda()
        if reason is not None:
            warnings.warn(f"{reason} The CPU is used; ask for cuda to get stock PyTorch there.", stacklevel=2)
            return torch.device("cpu")
        return torch.device("cuda", 0)
    if not torch.cuda.is_available():
        raise ValueError(f"{name}: this PyTorch sees no GPU")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"{name}: this PyTorch sees {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", index)


def build_info() -> dict[str, Any]:
    """What was built, what this machine runs, and which torch. Also answers when the extension is unavailable.

    Returns:
        `version`, `available`, `why_unavailable`, `torch` (running), `torch_at_build`, `compiler`, `cpu_isas_built`,
        `cpu_isa_detected`, `cpu_isa` (in use), `cpu_isa_note` (why a better one that the CPU
        has is not used), `cuda_archs` (built), `cuda_usable` (whether the first GPU runs the kernels), `why_no_cuda`
        (one sentence, or None). What is not known is None.
    """
    module, reason = _load()
    built = (module.build_config() if module else {}) | _read_build_config()
    return {
        "version": __version__,
        "available": module is not None,
        "why_unavailable": reason,
        "torch": str(torch.__version__),
        "torch_at_build": built.get("torch_version"),
        "compiler": built.get("compiler"),
        "cpu_isas_built": built.get("isas", []),
        "cpu_isa_detected": module.detected_isa() if module else None,
        "cpu_isa": module.current_isa() if module else None,
        "cpu_isa_note": module.isa_note() if module else None,
        "cuda_archs": built.get("cuda_archs", []),
        "cuda_usable": why_no_cuda() is None,
        "why_no_cuda": why_no_cuda(),
    }


@cache
def _load() -> _Loaded:
    environment = _env.read()
    if environment.disable:
        return _Loaded(None, "fused_resnet runs on stock PyTorch: FUSED_RESNET_DISABLE is set.")
    built_for = _read_build_config().get("torch_version")
    if built_for is not None and _release(built_for) != _release(str(torch.__version__)):
        return _unusable(f"its extension was built for torch {built_for}, but torch {torch.__version__} runs")
    # Of this very package: an editable install of another copy offers its own extension for the same name.
    if PathFinder.find_spec("fused_resnet._C", [str(_BUILD_CONFIG.parent)]) is None:
        return _unusable("its extension is not built")
    try:
        module = importlib.import_module("fused_resnet._C")
    except (ImportError, OSError) as error:
        return _unusable(f"its extension cannot be loaded ({str(error).splitlines()[0]})")
    module.set_verbose(environment.verbose)
    if environment.max_cpu_isa is not None:
        try:
            module.set_isa_cap(environment.max_cpu_isa)
        except (RuntimeError, ValueError) as error:
            warnings.warn(f"FUSED_RESNET_MAX_CPU_ISA={environment.max_cpu_isa} is ignored: {error}", stacklevel=2)
    return _Loaded(module, None)


def _unusable(cause: str) -> _Loaded:
    reason = f"fused_resnet runs on stock PyTorch because {cause}; to get the fused kernels, {_REBUILD}."
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return _Loaded(None, reason)


def _release(version: str) -> str:
    return version.partition("+")[0]  # "+cpu" and "+cu128" share one C++ interface


def _read_build_config() -> dict[str, Any]:
    try:
        config = json.loads(_BUILD_CONFIG.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
