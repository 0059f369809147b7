"""Every fused operator on small shapes, forward and backward: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m gpu.sanitized

Small, because a watched kernel runs a hundred times slower; odd extents, because tails are where accesses go wrong.
Results are compared with stock PyTorch's, unless --unchecked says that only our own kernels are to be watched.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import timing
import torch
from units import KINDS, Case, Unit

from fused_resnet import testing
from gpu import common

EXTENTS = ((13, 5, 3), (64, 9, 8))  # channels, height, width: tails of everything, and full vectors
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--dtype", nargs="+", choices=common.DTYPES, default=["fp32", "bf16", "fp16"])
    parser.add_argument("--unchecked", action="store_true", help="do not compare: run no reduction that is not ours")
    options = parser.parse_args(arguments)
    where = common.device(options)
    fused = 0
    for kind, dtype, layout, extent in itertools.product(KINDS, options.dtype, timing.LAYOUTS, EXTENTS):
        unit = Unit("small", 1, *extent, kind)
        with torch.device(where):
            case = Case(unit, 3, common.DTYPES[dtype], timing.LAYOUTS[layout])
        what = f"{kind} {extent} {dtype} {layout}"
        results = case.results()
        if not options.unchecked:
            timing.verify(what, results, case.reference(), TOLERANCE[dtype])
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
