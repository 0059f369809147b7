"""What this GPU can do at best, as PyTorch reaches it: copy, read and write bandwidth, matrix products, launches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from gpu import common
from gpu.clock import interleave
from gpu.common import Row

COPY_BYTES = (16 << 20, 64 << 20, 256 << 20, 1 << 30)
MATRIX = 8192


def bandwidth(size: int, where: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls on a tensor of `size` bytes, with the bytes that each moves."""
    source, target = (torch.zeros(size // 2, dtype=torch.bfloat16, device=where) for _ in range(2))
    return {
        "copy": (lambda: target.copy_(source), 2 * size),
        "write": (lambda: target.zero_(), size),
        "read": (lambda: torch.amax(source), size),
    }


def measure_bandwidth(size: int, where: torch.device, rounds: int) -> list[Row]:
    """Rows of copy, write and read at one size."""
    calls = bandwidth(size, where)
    result = interleave({n: call for n, (call, _) in calls.items()}, where, rounds=rounds, sample_seconds=0.01)
    return [
        {
            "name": name, "bytes": size, "seconds": result.time(name).to_json(),
            "gb_per_s": round(moved / result.time(name).median / 1e9, 1),
        }
        for name, (_, moved) in calls.items()
    ]  # fmt: skip


def measure_matmul(name: str, dtype: torch.dtype, size: int, where: torch.device, rounds: int) -> Row:
    """One row of a square matrix product; "tf32" is fp32 operands on the tensor cores."""
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        result = interleave({"matmul": lambda: torch.mm(a, b)}, where, rounds=rounds, sample_seconds=0.02)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    seconds = result.time("matmul")
    tflops = 2 * size**3 / seconds.median / 1e12
    return {
        "name": f"matmul {name}", "size": size, "seconds": seconds.to_json(), "tflop_per_s": float(f"{tflops:.4g}"),
    }  # fmt: skip


def measure_launch(where: torch.device, rounds: int) -> Row:
    """How far apart the smallest kernels run when they queue up: the floor of every launch."""
    x = torch.zeros(1, device=where)
    result = interleave({"launch": lambda: x.add_(1)}, where, rounds=rounds, sample_seconds=0.005)
    return {"name": "launch", "seconds": result.time("launch").to_json()}


def line(row: Row) -> str:
    """One result as a line of text."""
    seconds = row["seconds"]
    assert isinstance(seconds, dict)
    what = f"{row['name']:<14}"
    if "gb_per_s" in row:
        return f"{what}{int(str(row['bytes'])) >> 20:>6} MiB {row['gb_per_s']:>10} GB/s"
    if "tflop_per_s" in row:
        return f"{what}{row['size']:>6}     {row['tflop_per_s']:>10} TFLOP/s"
    return f"{what}           {seconds['median'] * 1e6:>10.2f} us"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=10, dtypes=("bf16", "fp16", "fp32"))
    parser.add_argument("--max-mb", type=int, default=1 << 10, help="largest tensor (default: %(default)s)")
    parser.add_argument("--matrix", type=int, default=MATRIX, help="extent of the matrices (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    where, deadline = common.device(options), common.Deadline(options.seconds)
    report = common.Report("ceilings", options, where)
    for size in COPY_BYTES:
        if size <= options.max_mb << 20:
            for row in measure_bandwidth(size, where, options.rounds):
                report.add(row, line(row))
    report.add(row := measure_launch(where, options.rounds), line(row))
    products = [(name, common.DTYPES[name]) for name in options.dtype]
    if where.type == "cuda" and "fp32" in options.dtype:
        products.append(("tf32", torch.float32))
    for name, dtype in products:
        skipped = deadline.skip(1)
        if skipped:
            report.add({"name": f"matmul {name}", "skipped": skipped})
        else:
            report.add(row := measure_matmul(name, dtype, options.matrix, where, options.rounds), line(row))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
