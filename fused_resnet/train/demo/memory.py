"""Peak memory of training, measured for each side in a fresh process of its own.

What counts is how far the resident set grows above what it was when network and data were ready: weights' gradients,
momentum, activations and scratch, but neither Python nor PyTorch nor the images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

from fused_resnet.train.errors import UserError
from fused_resnet.train.options import TrainOptions, plain
from fused_resnet.train.run import make_trainer, open_data

# Memory stops growing in the second step, when momentum and all gradients exist; a few more for the allocators.
_STEPS = 6
_SAMPLE_SECONDS = 0.001
_TIMEOUT_SECONDS = 300


def measure_both(options: TrainOptions) -> dict[str, int]:
    """Peak growth in bytes, {"fused": ..., "stock": ...}."""
    return {"fused": _measure(options), "stock": _measure(replace(options, stock=True))}


def _measure(options: TrainOptions) -> int:
    request = json.dumps({"options": plain(options), "threads": torch.get_num_threads()})
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "fused_resnet.train.demo.memory", request],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"measuring memory took more than {_TIMEOUT_SECONDS} seconds") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"measuring memory failed: {last}")
    return int(json.loads(done.stdout)["peak_growth_bytes"])


class PeakGrowth:
    """The largest resident set within the `with` block, above the one at its beginning, sampled every millisecond."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakGrowth:
        self._before = _resident_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, _resident_bytes() - self._before)
            if self._stop.wait(_SAMPLE_SECONDS):
                return


def _resident_bytes() -> int:
    """Of this process. Linux keeps it in /proc; elsewhere only the peak so far can be asked for."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(request: str) -> None:
    """Trains a few steps and prints the peak as JSON."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    options = TrainOptions(**asked["options"])
    trainer, _ = make_trainer(options, open_data(options))
    with PeakGrowth() as peak:
        for _, _ in zip(range(_STEPS), trainer.steps(), strict=False):
            pass
    print(json.dumps({"peak_growth_bytes": peak.bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
