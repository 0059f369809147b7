"""Which approximations the CPU's convolutions may use. Errors of each: docs/numerics.md.

What holds is read at every call. A backward pass is a call of its own: it takes what holds when it runs, not what held
when its forward pass did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fused_resnet import _extension


def set_winograd(allowed: bool) -> None:
    """Allows Winograd's F(4x4, 3x3) for 3x3 convolutions of stride 1 and their gradients, the default, or not.

    It holds for the whole process.

    It is two to three times as fast as a direct convolution in single precision. Relative errors are near 7e-7 instead
    of 1.5e-7; those of eager PyTorch are 3e-7 to 8e-7 for 64 to 512 channels (docs/numerics.md). Results are as
    reproducible with it as without.
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


def set_split_bfloat16(allowed: bool | None) -> None:
    """Allows fp32 convolutions as products of bfloat16 parts on CPUs with AMX, or not; in the whole process.

    A float is the sum of three bfloat16. Six products of parts make up one of floats, with errors no larger than those
    of fp32 arithmetic (docs/numerics.md). After ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` three
    products of two parts do, relative errors near 4e-6. So it is with ``"tf32"`` or ``"bf16"`` in
    ``torch.backends.mkldnn.conv.fp32_precision``, which comes first where it is set.

    Args:
        allowed: None, the default: where they were measured to be faster than AVX-512 (docs/convolution.md). True:
            wherever there is a kernel for them. False: nowhere.
    """
    if _extension.available():
        _extension.extension().set_split_bfloat16(allowed)


def split_bfloat16_allowed() -> bool | None:
    """Says what `set_split_bfloat16` was told last; without the extension False."""
    return _extension.extension().split_bfloat16() if _extension.available() else False


@contextmanager
def split_bfloat16(allowed: bool | None) -> Iterator[None]:
    """Within this context `set_split_bfloat16(allowed)` holds, for backward passes that run within it too."""
    before = split_bfloat16_allowed()
    set_split_bfloat16(allowed)
    try:
        yield
    finally:
        set_split_bfloat16(before)
