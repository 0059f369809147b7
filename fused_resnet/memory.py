"""The activation pool: large CPU blocks that are kept from step to step instead of going back to the system.

Fused operators, and the convolutions they call, allocate blocks of a megabyte or more from it. Fresh pages cost several
times the kernel that fills them, and a training step asks for the same ones each time. See docs/architecture.md.
"""

from fused_resnet import _extension


def stats() -> dict[str, int]:
    """Returns `reserved_bytes` (address space), `live_bytes` and `peak_live_bytes`; nothing without the extension."""
    if not _extension.available():
        return {}
    result: dict[str, int] = _extension.extension().pool_stats()
    return result


def set_enabled(enabled: bool) -> None:
    """Turns the pool on or off for new blocks, in the whole process. Live blocks stay where they are."""
    if _extension.available():
        _extension.extension().set_pool_enabled(enabled)


def is_enabled() -> bool:
    """Says whether new blocks come from the pool."""
    return _extension.available() and bool(_extension.extension().pool_enabled())


def trim() -> None:
    """Gives every unused page of the pool back to the system. Live blocks stay."""
    if _extension.available():
        _extension.extension().trim_pool()
