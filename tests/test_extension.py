"""A missing, broken, mismatched or disabled extension: one sentence, and the package works on stock PyTorch.

Each case imports a copy of the package in a subprocess, because the extension loads once per process.
"""

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet

PACKAGE = Path(fused_resnet.__file__).parent
EXTENSION = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
USE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_resnet as fr
    import fused_resnet.ops
import torch
x, mean, var = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3)
y = fr.ops.batch_norm_act(x, mean, var)
print(json.dumps({
    "file": fr.__file__,
    "available": fr.is_available(),
    "info": fr.build_info(),
    "warnings": [str(warning.message) for warning in caught if "fused_resnet" in str(warning.message).lower()],
    "loaded": "fused_resnet._C" in sys.modules,
    "right": bool((y - torch.relu(torch.nn.functional.batch_norm(x, mean, var))).abs().max() < 1e-5),
}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy without the extension."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "fused_resnet", ignore=ignore))


def use(package: Path, **environment: str) -> dict[str, Any]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
    result = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=package.parent,
        env=clean | {"PYTHONPATH": str(package.parent)} | environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen: dict[str, Any] = json.loads(result.stdout)
    assert Path(seen["file"]).parent == package
    return seen


def check_stock(seen: dict[str, Any], reason: str) -> None:
    assert seen["available"] is False
    assert seen["info"]["available"] is False
    assert seen["info"]["torch"] == torch.__version__
    assert reason in seen["info"]["why_unavailable"]
    assert seen["info"]["why_unavailable"].endswith(".")
    assert "\n" not in seen["info"]["why_unavailable"]
    assert seen["right"]


def test_missing(package: Path) -> None:
    seen = use(package)
    check_stock(seen, "its extension is not built")
    assert seen["warnings"] == [seen["info"]["why_unavailable"]]


def test_broken(package: Path) -> None:
    (package / EXTENSION).write_bytes(b"no shared library")
    seen = use(package)
    check_stock(seen, "its extension cannot be loaded")
    assert seen["warnings"] == [seen["info"]["why_unavailable"]]


def test_built_for_another_torch_is_not_even_loaded(package: Path) -> None:
    (package / EXTENSION).write_bytes(b"no shared library")
    (package / "_C.json").write_text(json.dumps({"torch_version": "1.13.1+cpu", "isas": ["scalar"]}), encoding="utf-8")
    seen = use(package)
    check_stock(seen, f"built for torch 1.13.1+cpu, but torch {torch.__version__} runs")
    assert seen["warnings"] == [seen["info"]["why_unavailable"]]
    assert seen["info"]["torch_at_build"] == "1.13.1+cpu"


def test_an_unreadable_description_is_as_none(package: Path) -> None:
    (package / "_C.json").write_text("{", encoding="utf-8")
    check_stock(use(package), "its extension is not built")


def test_disabled_says_nothing(package: Path) -> None:
    seen = use(package, FUSED_RESNET_DISABLE="1")
    check_stock(seen, "FUSED_RESNET_DISABLE is set")
    assert seen["warnings"] == []


@pytest.fixture
def built_package(package: Path, needs_extension: None) -> Path:
    for path in PACKAGE.glob("_C.*"):
        if path.suffix in (".so", ".json"):
            shutil.copy(path, package)
    return package


def test_another_build_of_the_same_torch_release_is_no_mismatch(built_package: Path) -> None:
    config = json.loads((built_package / "_C.json").read_text(encoding="utf-8"))
    config["torch_version"] = config["torch_version"].partition("+")[0] + "+another"
    (built_package / "_C.json").write_text(json.dumps(config), encoding="utf-8")
    seen = use(built_package)
    assert seen["available"]
    assert seen["right"]
    assert seen["warnings"] == []


def test_the_instruction_set_is_capped(built_package: Path) -> None:
    seen = use(built_package, FUSED_RESNET_MAX_CPU_ISA="scalar")
    assert seen["info"]["cpu_isa"] == "scalar"
    assert seen["right"]
    assert seen["warnings"] == []


def test_an_unknown_instruction_set_is_named_and_ignored(built_package: Path) -> None:
    seen = use(built_package, FUSED_RESNET_MAX_CPU_ISA="sse9")
    assert seen["available"]
    assert seen["info"]["cpu_isa"] == seen["info"]["cpu_isa_detected"]
    assert len(seen["warnings"]) == 1
    assert "FUSED_RESNET_MAX_CPU_ISA=sse9 is ignored" in seen["warnings"][0]
