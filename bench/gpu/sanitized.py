"""Every fused operator on small shapes, forward and backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m gpu.sanitized

Small, because a watched kernel runs a hundred times slower; odd extents, because tails are where accesses go wrong.
Results are compared with stock PyTorch's, unless --unchecked says that only our own kernels are to be watched. fp32 and
bf16 run everything; the other dtypes, and prelu with its sums over slopes, run the extents that have tails.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import timing
import torch
import torch.nn.functional as F
from units import KINDS, Case, Unit

from fused_resnet import testing
from gpu import common

EXTENTS = ((13, 5, 3), (64, 9, 8))  # channels, height, width: tails of everything, and full vectors
DTYPES = common.DTYPES | {"fp64": torch.float64}
EVERYTHING = ("fp32", "bf16")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3, "fp64": 1e-10}


def cases(dtypes: Sequence[str]) -> Iterator[tuple[str, str, str, tuple[int, int, int], bool]]:
    """Kind, dtype, layout, extent, and whether the activation is prelu."""
    for kind, dtype, layout in itertools.product(KINDS, dtypes, timing.LAYOUTS):
        for extent in EXTENTS if dtype in EVERYTHING else EXTENTS[:1]:
            yield kind, dtype, layout, extent, False
        if kind != "bn":  # which has no activation
            yield kind, dtype, layout, EXTENTS[0], True


def activation(case: Case, prelu: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the fused and the eager unit are told about it; nothing: relu."""
    if not prelu:
        return {}, {}
    dtype = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    slope = torch.rand(case.unit.channels, dtype=dtype, device=case.x.device).requires_grad_()
    case.differentiable.append(slope)
    return {"act": "prelu", "act_weight": slope}, {"act": lambda y: F.prelu(y, slope)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--unchecked", action="store_true", help="do not compare: run no reduction that is not ours")
    options = parser.parse_args(arguments)
    where = common.device(options)
    fused = 0
    for kind, dtype, layout, extent, prelu in cases(options.dtype):
        unit = Unit("small", 1, *extent, kind)
        with torch.device(where):
            case = Case(unit, 3, DTYPES[dtype], timing.LAYOUTS[layout])
        ours, eagers = activation(case, prelu)
        what = f"{kind} {extent} {dtype} {layout}{' prelu' if prelu else ''}"
        results = case.results(**ours)
        if not options.unchecked:
            timing.verify(what, results, case.reference(**eagers), TOLERANCE[dtype])
        case.call("infer", case.kind.fused)()
        if case.kind.norm:
            fused += testing.count_batch_norms(case.call("forward", case.kind.fused)).fused
    common.synchronize(where)
    if not fused:
        raise SystemExit("nothing ran fused")
    print(f"sanitized: {fused} fused batch norms ran{'' if options.unchecked else ' and agreed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
