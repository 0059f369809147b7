"""Tensors in the mapped pages of a file."""

from __future__ import annotations

import mmap
from typing import Any

from torch import Tensor


class MappedTensors(dict[str, Tensor]):
    """Tensors by name, all in `pages`, which are private to this process."""

    def __init__(self, pages: mmap.mmap) -> None:
        super().__init__()
        self._pages = pages

    def release(self) -> None:
        """Gives the memory of the pages back, where the system can; reading fills it from the file again.

        Not after somebody wrote to a tensor: what was written is in these pages alone.
        """
        if hasattr(mmap, "MADV_DONTNEED") and all(tensor._version == 0 for tensor in self.values()):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy elsewhere has memory of its own
