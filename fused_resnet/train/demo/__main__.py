"""`python -m fused_resnet.train.demo`: trains, compares, and writes out/report.html and out/report.json."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_resnet.train.demo import memory, page, results, side_by_side
from fused_resnet.train.errors import UserError
from fused_resnet.train.progress import clock, notice

NOISE = 0.015  # of test accuracy between two trainings that differ in rounding alone: 5 of 360 images


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0 when the network reads enough of the test digits, and as many as stock PyTorch's."""
    parser = argparse.ArgumentParser(prog="python -m fused_resnet.train.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")
    parser.add_argument("--epochs", type=int, default=side_by_side.EPOCHS, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--expect",
        type=float,
        default=0.98,
        metavar="X",
        help="test accuracy to reach for exit code 0 (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code


def _run(arguments: argparse.Namespace) -> int:
    begin = time.perf_counter()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = side_by_side.options(epochs=arguments.epochs, seed=arguments.seed)
    # Before anything is trained here: the measuring processes should have the machine to themselves.
    notice("measuring peak memory, one fresh process for each side ...")
    peaks = memory.measure_both(options)
    outcome = side_by_side.train_both(options)
    report = results.collect(outcome, peaks, seconds=time.perf_counter() - begin)
    arguments.out.mkdir(parents=True, exist_ok=True)
    html, data = arguments.out / "report.html", arguments.out / "report.json"
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    html.write_text(page.render(report, outcome.dataset.test), encoding="utf-8")
    print(results.sentence(report))
    print(f"done in {clock(report['seconds'])}; open {html} (figures: {data})")
    accuracy = report["fused"]["test_accuracy"][-1]
    if accuracy < arguments.expect:
        print(f"demo: test accuracy {accuracy:.2%} is below the expected {arguments.expect:.0%}", file=sys.stderr)
        return 1
    apart = abs(accuracy - report["stock"]["test_accuracy"][-1])
    if apart > NOISE:
        print(f"demo: fused and stock end {apart:.2%} apart in accuracy, expected {NOISE:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
