"""Peak memory of some training steps, measured in a process that does nothing else.

What is reported is the highest resident set during the steps less the resident set right after the model and its input
were built: activations, gradients, optimiser state and workspaces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from models import Setting

STEPS = 4


def status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def forget_earlier_peak() -> None:
    """Sets this process's VmHWM back to VmRSS: imports and initialisation may have needed more than small steps do."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        print(f"peak memory may include the start of the process: {error}", file=sys.stderr)


def peak_of(setting: Setting, side: str) -> int | None:
    """Peak minus baseline of `STEPS` steps in this process."""
    from models import build, step_of

    model, x, target = build(setting)
    step = step_of(model, x, target, side, setting.dtype)
    forget_earlier_peak()
    before = status("VmRSS")
    for _ in range(STEPS):
        step()
    peak = status("VmHWM")
    return None if before is None or peak is None else peak - before


def in_process(setting: Setting, side: str) -> int | None:
    """The same in a fresh process with as many threads as this one has."""
    fields = json.dumps([vars(setting), side, torch.get_num_threads()])
    run = subprocess.run([sys.executable, __file__, fields], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{setting}: measuring the memory of {side} failed:\n{run.stderr}")
    return int(run.stdout) or None


def _main() -> None:
    from models import Setting

    fields, side, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(peak_of(Setting(**fields), side) or 0)


if __name__ == "__main__":
    _main()
