"""Builds the extension with CUDA for this machine's GPU into the source tree, and checks that the result is usable.

No network and no installer: setup.py alone, in an empty working folder, because setuptools older than 77 cannot read
pyproject.toml's licence field and would stop at it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CHECK = "import json, fused_resnet as fr; print(json.dumps(fr.build_info()))"


def architecture(capability: tuple[int, int]) -> str:
    """What to build for one GPU: its own architecture, or PTX that its driver translates."""
    if capability == (9, 0):
        return "9.0a"
    return "8.0" if capability[0] == 8 else "8.0+PTX"


def main() -> int:
    """Builds, then asks a fresh process for `fused_resnet.build_info()`."""
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA GPU: torch.cuda.is_available() is False (torch {torch.__version__})")
    environment = dict(os.environ, FUSED_RESNET_CUDA="1")
    environment.setdefault("TORCH_CUDA_ARCH_LIST", architecture(torch.cuda.get_device_capability()))
    environment.pop("FUSED_RESNET_DISABLE", None)
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(ROOT)]
        command += ["--build-temp", empty]
        status = subprocess.run(command, cwd=empty, env=environment, check=False).returncode
    if status:
        return status
    check = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, check=False)
    print(check.stdout.strip() or check.stderr.strip())
    if '"cuda_usable": true' not in check.stdout:
        raise SystemExit("built, but fused_resnet.build_info() does not say cuda_usable: true")
    return 0


if __name__ == "__main__":
    sys.exit(main())
