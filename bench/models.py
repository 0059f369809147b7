"""Times whole training steps of whole models, fused against stock PyTorch.

    python bench/models.py                              ResNet-18 and -50, batch 16; CIFAR ResNet-20, batch 1 and 128
    python bench/models.py --model all --batch 8        the ten ImageNet models
    python bench/models.py --model resnet50 --recompute --name models-recompute   less memory, more time
    python bench/models.py --quick --model resnet18     a first look

A step is forward, cross-entropy, backward and SGD with momentum. Both sides are the same model with the same weights;
the baseline runs it through `fused_resnet.nn.stock()`, which the tests prove equal to torchvision's. Loss and gradients
are compared first, then the contestants take turns in one process. A model whose blocks would run stock is refused.
Peak memory comes from a fresh process for each contestant. With --apart the steps are timed in such processes too.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import peak_memory
import timing
import torch
from apart import Apart
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing

Row = dict[str, object]

IMAGENET = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
DEFAULT = ("resnet18", "resnet50", "cifar.resnet20")
CIFAR_BATCHES = (1, 128)
SOFT = 0.1  # weight of the last batch norm of every block
# fp32: of fused against eager, relative; rounding differences grow through the layers, and a unit near zero may fall on
# the other side of the relu.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 2e-2
# bf16: both are compared with eager fp32, and fused may be this much further away than eager bf16 is.
BF16_FACTOR, BF16_SLACK, BF16_MOST = 1.5, 1e-2, 0.5  # the last: a gradient of zeros has error 1


@dataclass(frozen=True)
class Setting:
    """One model in one situation."""

    model: str
    batch: int
    size: int
    dtype: str
    layout: str
    recompute: bool = False

    def __str__(self) -> str:
        text = f"{self.model} batch {self.batch} {self.size}x{self.size} {self.dtype} {self.layout}"
        return f"{text}, recomputed" if self.recompute else text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*IMAGENET, *(f"cifar.{name}" for name in CIFAR), "all")
    parser.add_argument("--model", nargs="+", choices=names, default=DEFAULT, metavar="NAME", help=", ".join(names))
    parser.add_argument("--batch", nargs="+", type=timing.positive, help="default: 16; CIFAR models 1 and 128")
    parser.add_argument("--size", type=timing.positive, help="height and width (default: 224; CIFAR models 32)")
    parser.add_argument("--apart", action="store_true", help="each contestant in a process of its own")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--recompute", action="store_true", help="fused blocks keep less (fr.nn.set_memory); eager keeps all"
    )
    parser.add_argument("--name", default="models", help="name of the result file")
    timing.add_common_options(parser, rounds=9)
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask for, one by one."""
    names = [n for name in options.model for n in (IMAGENET if name == "all" else (name,))]
    result = []
    for name in dict.fromkeys(names):
        cifar = name.startswith("cifar.")
        for batch in options.batch or (CIFAR_BATCHES if cifar else (16,)):
            size = options.size or (32 if cifar else 224)
            result += [
                Setting(name, batch, size, dtype, layout, options.recompute)
                for dtype in options.dtype
                for layout in options.layout
            ]
    return result


def soften(model: nn.Module) -> None:
    """Makes the residual branches small, as zero_init_residual and some training do.

    The gradient of a fresh ResNet-50 is chaotic (norm 220, and eager bf16 differs from eager fp32 by 1.3 of the whole):
    nothing could be verified with it. The time of a step does not depend on the weights.
    """
    for block in model.modules():
        norms = [child for child in block.children() if isinstance(child, nn.BatchNorm2d)]
        if len(norms) > 1:
            nn.init.constant_(norms[-1].weight, SOFT)


def build(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    """Model in training mode, images, and class numbers."""
    torch.manual_seed(0)
    family, _, name = setting.model.rpartition(".")
    module = getattr(fr.models, family) if family else fr.models
    classes = 10 if family else 1000
    layout = timing.LAYOUTS[setting.layout]
    model: nn.Module = getattr(module, name)().train().to(memory_format=layout)
    soften(model)
    if setting.recompute:  # stock blocks do not look at it
        fr.nn.set_memory(model, "recompute")
    x = torch.randn(setting.batch, 3, setting.size, setting.size).to(memory_format=layout)
    return model, x, torch.randint(0, classes, (setting.batch,))


def step_of(model: nn.Module, x: Tensor, target: Tensor, side: str, dtype: str) -> Callable[[], Tensor]:
    """The training step of one contestant: "fused", "eager" or "compile" (of the stock code)."""
    return testing.training_step(
        torch.compile(model) if side == "compile" else model,
        list(model.parameters()),
        x,
        target,
        bf16=dtype == "bf16",
        context=nullcontext if side == "fused" else fr.nn.stock,
    )


def refuse_stock(setting: Setting, model: nn.Module, step: Callable[[], Tensor], options: argparse.Namespace) -> None:
    """Exits unless every batch norm of the step ran fused, or stock is allowed."""
    calls = testing.count_batch_norms(step)
    if options.allow_stock or (calls.fused and not calls.stock):
        return
    print(fr.nn.explain(model))
    raise SystemExit(
        f"{setting}: {calls.stock} batch norms ran stock, {calls.fused} fused (--allow-stock times it anyway)"
    )


def loss_and_gradient(step: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Runs one step: its loss, and all gradients as one vector."""
    loss = step()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def verify(
    setting: Setting, model: nn.Module, x: Tensor, target: Tensor, results: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Compares loss and gradients of fused and eager and returns the relative errors; `model` is as they started."""
    errors = {}
    fused, eager = results["fused"], results["eager"]
    if setting.dtype == "fp32":
        tolerances = (LOSS_TOLERANCE, GRADIENT_TOLERANCE)
        reference = eager
    else:
        exact = copy.deepcopy(model)
        reference = loss_and_gradient(step_of(exact, x, target, "eager", "fp32"), exact)
        for key, value, expected in zip(("eager_loss", "eager_gradient"), eager, reference, strict=True):
            errors[key] = timing.relative_error(value, expected)
        tolerances = (
            BF16_FACTOR * errors["eager_loss"] + BF16_SLACK,
            min(BF16_FACTOR * errors["eager_gradient"] + BF16_SLACK, BF16_MOST),
        )
    for key, value, expected, tolerance in zip(("loss", "gradient"), fused, reference, tolerances, strict=True):
        errors[key] = timing.verify(f"{setting}: {key}", [value], [expected], tolerance)
    return errors


def measure(setting: Setting, options: argparse.Namespace, progress: timing.Progress) -> Row | None:
    """Verifies and times one setting; None on a dry run."""
    progress.begin(str(setting))
    model, x, target = build(setting)
    sides = ["eager", "fused"] + (["compile"] if options.compile else [])
    models = {side: copy.deepcopy(model) for side in sides}
    steps = {side: step_of(models[side], x, target, side, setting.dtype) for side in sides}
    results = {side: loss_and_gradient(steps[side], models[side]) for side in ("fused", "eager")}
    errors = verify(setting, model, x, target, results)
    del results
    refuse_stock(setting, models["fused"], steps["fused"], options)
    if testing.count_batch_norms(steps["eager"]).fused:
        raise SystemExit(f"{setting}: the baseline ran fused operators")
    if options.dry:
        progress.advance(options.rounds)
        return None
    apart = {side: Apart(setting, side) for side in sides} if options.apart else {}
    comparison = testing.interleave(
        apart or steps, rounds=options.rounds, warmup=1, clock=timing.CLOCKS[options.clock], on_round=progress.advance
    )
    for contestant in apart.values():
        contestant.close()
    row: Row = {
        "name": setting.model, "batch": setting.batch, "size": setting.size, "dtype": setting.dtype,
        "layout": setting.layout, "pass": "training step", "apart": options.apart, "recompute": setting.recompute,
        "error": {key: float(f"{value:.3g}") for key, value in errors.items()},
        "speedup": comparison.ratio("eager", "fused").to_json(),
    }  # fmt: skip
    if options.compile:
        row["speedup_over_compile"] = comparison.ratio("compile", "fused").to_json()
    for side in sides:
        row[f"{side}_seconds"] = comparison.time(side).to_json()
        row[f"{side}_images_per_s"] = round(setting.batch / comparison.time(side).median, 3)
        if not apart:  # they are counted in this process
            row[f"{side}_page_faults"] = comparison.page_faults(side)
    return row


def add_memory(setting: Setting, row: Row) -> None:
    """Adds the peak memory of both contestants to a row, each measured in a fresh process."""
    peaks = {side: peak_memory.in_process(setting, side) for side in ("eager", "fused")}
    if None in peaks.values():
        return
    for side, peak in peaks.items():
        row[f"{side}_peak_bytes"] = peak
    row["memory_ratio"] = round(peaks["fused"] / peaks["eager"], 4)  # type: ignore[operator]


def line(row: Row) -> str:
    """One result as a line of text."""
    speedup = row["speedup"]
    assert isinstance(speedup, dict)
    text = (
        f"{row['name']:<18}batch {row['batch']:<4}{row['size']:>4}  {row['dtype']:<5}{row['layout']:<14}"
        f"eager {row['eager_images_per_s']:8.2f} img/s  fused {row['fused_images_per_s']:8.2f} img/s  "
        f"{speedup['median']:.3f}x [{speedup['q1']:.3f}, {speedup['q3']:.3f}]"
    )
    if "speedup_over_compile" in row:
        text += f"  compile {row['compile_images_per_s']:8.2f} img/s"
    return text + (f"  memory {row['memory_ratio']:.2f}x" if "memory_ratio" in row else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    timing.apply_common_options(options)
    chosen = settings(options)
    progress = timing.Progress(len(chosen) * options.rounds)
    rows = []
    for setting in chosen:
        row = measure(setting, options, progress)
        if row is None:
            continue
        if not options.no_memory:
            add_memory(setting, row)
        progress.say(line(row))
        rows.append(row)
    progress.close()
    if options.dry:
        print("dry run: everything agreed, nothing timed")
        return
    path = timing.write(timing.document("models", options, rows, []), options.output, options.name)
    print(f"\nwritten: {timing.show(path)}")


if __name__ == "__main__":
    main()
