"""Inference of ResNet-50 and -18 on a GPU: eager, torch.compile (frozen weights, CUDA graphs) and ours, bf16 and fp16.

All have the same weights, batch norms with statistics included, and images that are channels_last in the dtype computed
in. Logits are compared first, with eager fp32 as the judge. Ours must have run cuDNN's fused convolutions and be one
CUDA graph. All settings are timed without torch.compile first, then with it as long as there is time; those for which
there is none say so, which makes the run incomplete. `--mode max-autotune` tries Triton's convolutions and products,
about 10 s for each of ResNet-50's 40 shapes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence

import timing
import torch
from contestants import Setting as Case
from contestants import images, network
from models import Setting
from torch import Tensor, nn

import fused_resnet as fr
from gpu import common, schedule
from gpu.clock import interleave
from gpu.common import Row
from gpu.models import line
from gpu.steps import exact_convolutions

SECONDS_OF_A_SETTING = 4.0
# Until the first setting has shown it. max-autotune had not finished ResNet-50 at batch 64 after 175 s on an H200.
SECONDS_TO_COMPILE = {
    "reduce-overhead": {"resnet18": 20.0, "resnet50": 40.0},
    "max-autotune": {"resnet18": 200.0, "resnet50": 420.0},
}
FACTOR, SLACK = 1.5, 1e-2  # of eager's error, as in bench/inference.py
FUSED = ("aten::cudnn_convolution_relu", "aten::cudnn_convolution_add_relu")

Call = Callable[[], Tensor]


def stock(model: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """PyTorch's own code."""

    def call() -> Tensor:
        with fr.nn.stock(), torch.no_grad():
            return model(x)

    return call


def compiled(model: nn.Module, x: Tensor, mode: str) -> Call:
    """torch.compile with the weights as constants, batch norms folded into them, and CUDA graphs."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return stock(torch.compile(model, mode=mode, fullgraph=True, dynamic=False), x)


def refuse_stock(module: Callable[[Tensor], object], x: Tensor) -> None:
    """Makes the first call; exits unless it ran fused convolutions and recorded them, so that the next runs none."""
    first, again = (timing.events(lambda: module(x)) for _ in range(2))
    fused = sum(name in FUSED for name in first)
    if not fused or any("conv" in name for name in again):
        raise SystemExit(f"ours: {fused} fused convolutions at the first call, then {sorted(set(again))}")


def contestant(side: str, model: nn.Module, x: Tensor, options: argparse.Namespace) -> Call:
    """One way to run the network on these images, warm."""
    model = copy.deepcopy(model)
    if side != "fused":
        model = model.to(x.dtype, memory_format=torch.channels_last)
        call = compiled(model, x, options.mode) if side == "compile" else stock(model, x)
        call()
        return call
    ours = fr.optimize_for_inference(model, dtype=x.dtype)
    if not options.allow_stock:
        refuse_stock(ours, x)
    return lambda: ours(x)


def measure(setting: Setting, sides: Sequence[str], where: torch.device, options: argparse.Namespace) -> Row:
    """Verifies and times one setting."""
    row: Row = {
        "name": setting.model, "batch": setting.batch, "size": setting.size, "dtype": setting.dtype,
        "layout": setting.layout, "pass": "inference", "graphs": False,
    }  # fmt: skip
    model = network(setting.model).to(where)
    x = images(Case(setting.model, setting.batch, setting.size, setting.dtype, 1)).to(where)
    with exact_convolutions():
        exact = stock(model, x)()
    x = x.to(common.DTYPES[setting.dtype], memory_format=torch.channels_last)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for side in sides:
        try:
            calls[side] = contestant(side, model, x, options)
            allowed = 1.0 if side == "eager" else FACTOR * errors["eager"] + SLACK
            errors[side] = timing.verify(f"{setting}: {side}", [calls[side]()], [exact], allowed)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            if side != "compile":
                raise
            calls.pop(side, None)
            row["failed"] = f"torch.compile: {common.reason(error)}"
    row |= {"sides": list(calls), "error": {side: float(f"{error:.3g}") for side, error in errors.items()}}
    result = interleave(calls, where, rounds=options.rounds, sample_seconds=options.sample, warmup=3)
    return schedule.with_times(row, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=100)
    parser.add_argument("--model", nargs="+", default=["resnet50", "resnet18"], help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1], help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--mode", choices=SECONDS_TO_COMPILE, default="reduce-overhead", help="torch.compile's (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sample", type=float, default=0.02, help="seconds of a sample (default: %(default)s)")
    parser.add_argument("--allow-stock", action="store_true", help="time even what does not run fused")
    options = parser.parse_args(arguments)
    where = common.device(options)
    report = common.Report("inference", options, where)
    sides = ["eager", "fused"] if options.no_compile else ["eager", "compile", "fused"]
    settings = [
        Setting(name, batch, options.size, dtype, "channels_last")
        for dtype, name, batch in itertools.product(options.dtype, options.model, options.batch)
    ]
    work = schedule.Work(
        lambda setting, chosen: measure(setting, chosen, where, options), line, where, SECONDS_OF_A_SETTING,
        SECONDS_TO_COMPILE[options.mode], plain_first=True,
    )  # fmt: skip
    schedule.run(settings, sides, work, common.Deadline(options.seconds), report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
