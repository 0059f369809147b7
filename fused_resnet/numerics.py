"""Which approximations the CPU's convolutions may use. Errors of each: docs/numerics.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fused_resnet import _extension


def set_winograd(allowed: bool) -> None:
    """Allows Winograd's F(4x4, 3x3) for 3x3 convolutions of stride 1, the default, or not; in the whole process.

    It is two to three times as fast as a direct convolution in single precision and rounds about three times as much:
    relative errors near 1e-6 instead of 3e-7 (docs/numerics.md). Results are as reproducible with it as without.
    """
    if _extension.available():
        _extension.extension().set_winograd(allowed)


def winograd_allowed() -> bool:
    """Says whether 3x3 convolutions may be Winograd's."""
    return _extension.available() and bool(_extension.extension().winograd())


@contextmanager
def winograd(allowed: bool) -> Iterator[None]:
    """Within this context `set_winograd(allowed)` holds, for backward passes that run within it too."""
    before = winograd_allowed()
    set_winograd(allowed)
    try:
        yield
    finally:
        set_winograd(before)
