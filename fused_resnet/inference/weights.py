"""A graph's tensors as one dtype's computation reads them: cast once, packed once for each way of packing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fused_resnet.inference import graph as g
from fused_resnet.inference.mapped import MappedTensors
from fused_resnet.ops import _native

Extents = tuple[int, int, int, int]  # n, c, h, w
# Whether Winograd's algorithm is allowed; the bfloat16 parts of a float on AMX; whether only where that is faster.
Numerics = tuple[bool, int, bool]

_MOST_READ = 32 << 20  # after that many bytes: pages that are needed again must be found again, which takes longer


def geometry(step: g.Conv | g.Linear) -> tuple[g.Pair, g.Pair, g.Pair, int]:
    """Stride, padding, dilation and groups; a linear layer is a 1x1 convolution."""
    if isinstance(step, g.Linear):
        return (1, 1), (0, 0), (1, 1), 1
    return step.stride, step.padding, step.dilation, step.groups


class Weights(Mapping[str, Tensor]):
    """The tensors of `graph` in `dtype`, by name."""

    def __init__(self, graph: g.Graph, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.exact = graph.tensors
        self._cast: dict[str, Tensor] = {}
        self._read = 0  # bytes packed since memory was given back
        self._filters: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._packed: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._cast:
            exact = self.exact[name]
            self._cast[name] = exact.to(self.dtype) if exact.is_floating_point() else exact
        return self._cast[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.exact)

    def __len__(self) -> int:
        return len(self.exact)

    def shape(self, step: g.Conv | g.Linear) -> tuple[int, int, int, int]:
        """Of its weight: (K, C / groups, R, S)."""
        k, c, *taps = self.exact[step.weight].shape
        r, s = taps or (1, 1)
        return k, c, r, s

    def _like(self, step: g.Conv | g.Linear) -> Tensor:
        return torch.empty(self.shape(step), dtype=self.dtype, device="meta")

    def filters(self, step: g.Conv | g.Linear) -> Tensor:
        """The weight in this form, for as long as somebody holds it: most are read once, to be packed."""
        filters = self._filters.get(step.weight)
        if filters is None:
            filters = self._filters[step.weight] = self.exact[step.weight].to(self.dtype).view(self.shape(step))
        return filters

    def packed_format(self, step: g.Conv | g.Linear, x: Extents, numerics: Numerics) -> str | None:
        """How the weight is packed for this extent of x; None: there is no kernel."""
        name: str | None = _native.C.inference_packed_format(x, self._like(step), *geometry(step), numerics)
        return name

    def beside_packed(self, step: g.Conv | g.Linear, x: Extents, numerics: Numerics, packed: Tensor) -> Tensor:
        """The weight where the kernel of this extent may read it although it is packed; else only its shape."""
        like = self._like(step)
        reads: bool = _native.C.inference_reads_weight(x, like, *geometry(step), numerics, packed)
        return self.filters(step) if reads else like

    def packed(self, step: g.Conv | g.Linear, x: Extents, numerics: Numerics) -> Tensor:
        """The packed weight: one tensor for all extents of the same format, for as long as somebody holds it."""
        key = (step.weight, str(self.packed_format(step, x, numerics)))
        packed = self._packed.get(key)
        if packed is None:
            arguments = (x, self.filters(step), *geometry(step), numerics)
            packed = self._packed[key] = _native.C.inference_pack(*arguments)
            self._read += packed.numel()
            if self._read >= _MOST_READ:
                self.release()
        return packed

    def release(self) -> None:
        """Gives memory back: what was packed need not be there twice. To be called when a plan is complete."""
        if self._read > 0 and isinstance(self.exact, MappedTensors):
            self.exact.release()
        self._read = 0
