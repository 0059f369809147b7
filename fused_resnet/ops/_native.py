"""The compiled extension as the operators see it: `C` is the module, or None for the stock path."""

from __future__ import annotations

from typing import Any

from fused_resnet import _extension

C: Any = _extension.extension() if _extension.available() else None

if C is not None:
    from fused_resnet.ops import _fake

    _fake.register(C)
