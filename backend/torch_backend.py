"""In-tree PEP 517 backend: setuptools', built against the torch that is already installed.

pip builds in an isolated environment, and a torch fetched into it would be gigabytes of a possibly different version.
pip runs this backend with the target environment's own interpreter and hides its site-packages; so when torch is not
importable, these directories (and those of the activated virtual environment, for front ends that run another
interpreter) are appended to sys.path. Only when that finds no torch either is one asked for.
"""

import importlib.util
import os
import site
import sys
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta

TORCH = "torch>=2.11"
Settings = Mapping[str, Any] | None


def _site_directories() -> list[str]:
    directories = [*site.getsitepackages(), site.getusersitepackages()]
    activated = os.environ.get("VIRTUAL_ENV")
    if activated:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        directories.append(os.path.join(activated, "lib", version, "site-packages"))
    return [directory for directory in directories if os.path.isdir(directory)]


def _importable() -> bool:
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None  # no origin: an empty directory that an uninstall left behind


def _find_torch() -> bool:
    if _importable():
        return True
    before = list(sys.path)
    for directory in _site_directories():
        # Appended, so what the isolated environment brings still wins. addsitedir also follows .pth files.
        site.addsitedir(directory)
        if _importable():
            return True
    sys.path[:] = before
    return False


def _requires() -> list[str]:
    if _find_torch():
        return []
    print(
        "fused_resnet: no PyTorch is installed here, so one is fetched to build against; "
        "to build against a particular one, install it first ('pip install torch').",
        file=sys.stderr,
    )
    return [TORCH]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:  # noqa: ARG001  (PEP 517's name)
    return _requires()


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _find_torch()
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _find_torch()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))


get_requires_for_build_editable = get_requires_for_build_wheel
build_sdist = build_meta.build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
