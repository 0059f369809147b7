"""`fused-resnet bench`: what fusion gains for one model on this machine, in a minute or so."""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fused_resnet import _extension, models
from fused_resnet.nn import explain, stock
from fused_resnet.timing import count_batch_norms, cpu_model, interleave, training_step

IMAGENET_SIZE, CIFAR_SIZE = 224, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options to `parser`."""
    parser.add_argument("--model", default="resnet18", help="or cifar.resnet20, ... (default: resnet18)")
    parser.add_argument("--batch", type=_positive, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--size", type=_positive, help="height and width (default: 224; CIFAR models 32)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="both", help="bf16 is autocast")
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU the kernels can use)"
    )
    parser.add_argument("--threads", type=_positive, help="default: what torch chose")
    parser.add_argument("--rounds", type=_positive, default=7, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--inference", action="store_true", help="time the forward in eval mode, not training steps")


def main(args: argparse.Namespace) -> int:
    """Runs the command with parsed options; returns the exit status."""
    build = _find(args.model)
    if build is None:
        print(f"fused-resnet bench: no model named {args.model!r}", file=sys.stderr)
        return 2
    if not _extension.available():
        print(f"fused-resnet bench: nothing to compare: {_extension.why_unavailable()}", file=sys.stderr)
        return 1
    try:
        device = _extension.pick_device(args.device)
    except ValueError as error:
        print(f"fused-resnet bench: --device {error}", file=sys.stderr)
        return 2
    if device.type == "cuda" and _extension.why_no_cuda(device.index) is not None:
        print(f"fused-resnet bench: nothing to compare: {_extension.why_no_cuda(device.index)}", file=sys.stderr)
        return 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    size = args.size or (CIFAR_SIZE if args.model.startswith("cifar.") else IMAGENET_SIZE)
    model = build().to(device=device, memory_format=layout).train(not args.inference)
    x = torch.randn(args.batch, 3, size, size).to(device=device, memory_format=layout)
    what = "inference" if args.inference else "training step"
    print(f"{args.model}, batch {args.batch}, {size}x{size}, {args.layout}, {what}")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for both sides
        print(f"{torch.cuda.get_device_name(device)}, kernels cuda\n")
    else:
        print(f"{cpu_model()}, {torch.get_num_threads()} threads, kernels {_extension.build_info()['cpu_isa']}\n")
    print(f"{'':<7}{'stock ms':>10}{'fused ms':>10}{'stock img/s':>13}{'fused img/s':>13}{'faster':>9}   middle half")
    for dtype in ("fp32", "bf16") if args.dtype == "both" else (args.dtype,):
        if not _compare(model, x, dtype, args):
            print(explain(model))
            print("fused-resnet bench: this model runs stock, see above: nothing to compare", file=sys.stderr)
            return 1
    return 0


def _compare(model: nn.Module, x: Tensor, dtype: str, args: argparse.Namespace) -> bool:
    """Times one dtype and prints its line; False if the fused side ran stock batch norms."""
    fused_model, stock_model = model, copy.deepcopy(model)
    bf16 = dtype == "bf16"
    if args.inference:

        def infer(module: nn.Module) -> Tensor:
            with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                return module(x)  # type: ignore[no-any-return]

        def fused() -> Tensor:
            return infer(fused_model)

        def plain() -> Tensor:
            with stock():
                return infer(stock_model)
    else:
        target = torch.randint(0, 10, (len(x),), device=x.device)  # every model has at least ten classes
        steps = [
            training_step(module, list(module.parameters()), x, target, bf16=bf16, context=context)
            for module, context in ((fused_model, nullcontext), (stock_model, stock))
        ]
        fused, plain = steps
    calls = count_batch_norms(fused)
    if calls.stock or not calls.fused:
        return False
    clock = time.perf_counter if x.is_cpu else partial(_gpu_clock, x.device)
    result = interleave({"stock": plain, "fused": fused}, rounds=args.rounds, warmup=1, clock=clock, on_round=_dot)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    times = {name: result.time(name).median for name in ("stock", "fused")}
    ratio = result.ratio("stock", "fused")
    print(
        f"{dtype:<7}{times['stock'] * 1e3:>10.1f}{times['fused'] * 1e3:>10.1f}{len(x) / times['stock']:>13.2f}"
        f"{len(x) / times['fused']:>13.2f}{ratio.median:>8.2f}x   {ratio.q1:.2f} to {ratio.q3:.2f}"
    )
    return True


def _find(name: str):  # type: ignore[no-untyped-def]  # a model's constructor, or None
    place: object = models
    for part in name.split("."):
        place = None if part.startswith("_") else getattr(place, part, None)
    if not callable(place) or isinstance(place, type):
        return None
    parameters = inspect.signature(place).parameters.values()
    needs_more = any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return None if needs_more else place


def _gpu_clock(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _dot() -> None:
    if sys.stderr.isatty():
        sys.stderr.write(".")
        sys.stderr.flush()


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value
