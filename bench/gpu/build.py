"""Builds the extension with CUDA for this machine's GPU into the source tree, and checks that the result is usable.

No network and no installer: setup.py alone, in an empty working folder, because setuptools older than 77 cannot read
pyproject.toml's licence field and would stop at it. The architecture is this GPU's, whatever TORCH_CUDA_ARCH_LIST says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from backend import toolchain

ROOT = Path(__file__).resolve().parents[2]
CHECK = "import json, fused_resnet as fr; print(json.dumps(fr.build_info()))"


def known_to_nvcc() -> list[str]:
    """The architectures that this nvcc compiles for, such as "compute_90"."""
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        return []
    return subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()


def architecture(capability: tuple[int, int], known: Sequence[str]) -> str:
    """What to build for one GPU: its own architecture, or PTX that its driver translates."""
    major, minor = capability
    if capability == (9, 0):
        return "9.0a"
    if f"compute_{major}{minor}" in known:
        return f"{major}.{minor}"
    return "8.0" if major == 8 else "8.0+PTX"


def environment() -> dict[str, str]:
    """This process's, without what would have another architecture built, or the result not used."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_RESNET_")}
    wanted = architecture(torch.cuda.get_device_capability(), known_to_nvcc())
    return variables | {"FUSED_RESNET_CUDA": "1", "TORCH_CUDA_ARCH_LIST": wanted}


def main() -> int:
    """Builds, then asks a fresh process for `fused_resnet.build_info()`."""
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
    variables = environment()
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(ROOT)]
        command += ["--build-temp", empty]
        status = subprocess.run(command, cwd=empty, env=variables, check=False).returncode
    if status:
        return status
    asked = [sys.executable, "-c", CHECK]
    check = subprocess.run(asked, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    print(check.stdout.strip() or check.stderr.strip())
    if '"cuda_usable": true' not in check.stdout:
        raise SystemExit("built, but fused_resnet.build_info() does not say cuda_usable: true")
    return 0


if __name__ == "__main__":
    sys.exit(main())
