"""Every option of a training run, in one place: name, default, help, check. The command line is made from it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fused_resnet.train.errors import OptionError


def _option(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how. See `fused-resnet train --help` for each one."""

    model: str = _option("", "network, such as resnet50, cifar.resnet20 or preact.preresnet50", metavar="NAME")
    data: str = _option("", "folder of images by class, or with MNIST or CIFAR files; or 'digits'", metavar="DIR")
    out: str = _option("run", "folder for checkpoints and logs", metavar="DIR", free=True)
    epochs: int = _option(30, "passes over the training images", above=0)
    batch_size: int = _option(128, "images per step", above=0)
    lr: float = _option(0.1, "highest learning rate", above=0)
    momentum: float = _option(0.9, "of SGD", least=0, below=1)
    nesterov: bool = _option(False, "Nesterov's momentum")
    weight_decay: float = _option(1e-4, "of SGD, on every parameter", least=0)
    label_smoothing: float = _option(0.0, "share of the target spread over all classes", least=0, below=1)
    schedule: str = _option("cosine", "how the learning rate falls", choices=("cosine", "step", "constant"))
    milestones: str = _option("", "step schedule: epochs at which it falls (default: at 1/2 and 3/4)", metavar="30,60")
    gamma: float = _option(0.1, "step schedule: factor at each milestone", above=0, most=1)
    warmup_epochs: float = _option(0.0, "epochs during which the rate rises from near 0", least=0)
    bf16: bool = _option(False, "bfloat16 autocast")
    fp16: bool = _option(False, "float16 autocast with loss scaling; on a GPU only")
    channels_last: bool = _option(True, "images and weights in channels_last layout")
    stock: bool = _option(False, "train through stock PyTorch, without the fused kernels")
    size: int | None = _option(
        None, "side of the images (default: 32 for networks made for CIFAR, otherwise 224)", above=0
    )
    shift: int | None = _option(None, "random shift in pixels (default: suits the data)", least=0)
    flip: bool | None = _option(None, "mirror half of the images (default: suits the data)")
    min_scale: float | None = _option(None, "image files: smallest share of a photo a crop keeps", above=0, most=1)
    test_fraction: float = _option(0.1, "image files without val/: share held out for testing", above=0, below=1)
    skip_broken: bool = _option(False, "leave out broken and non-image files instead of stopping")
    seed: int = _option(0, "of weights, order and augmentation", least=0)
    device: str = _option("auto", "cpu, cuda or cuda:N; auto: a GPU the kernels can use", metavar="NAME", free=True)
    threads: int | None = _option(None, "CPU threads (default: PyTorch's choice)", above=0, free=True)
    workers: int = _option(2, "threads that decode image files", above=0, free=True)
    checkpoint_every: int = _option(0, "also write a checkpoint every so many steps", least=0, free=True)
    tensorboard: bool = _option(False, "write TensorBoard event files", free=True)
    quiet: bool = _option(False, "no progress bar", free=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, name = getattr(self, f.name), flag(f.name)
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise OptionError(f"{name} {value}: must be a finite number")
            limits = f.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise OptionError(f"{name} {value}: must be one of {', '.join(limits['choices'])}")
            for limit, broken, words in (
                ("above", lambda v, bound: v <= bound, "greater than"),
                ("least", lambda v, bound: v < bound, "at least"),
                ("below", lambda v, bound: v >= bound, "less than"),
                ("most", lambda v, bound: v > bound, "at most"),
            ):
                if limit in limits and broken(value, limits[limit]):
                    raise OptionError(f"{name} {value}: must be {words} {limits[limit]}")
        if not self.model:
            raise OptionError("--model is missing: say which network to train, such as --model resnet50")
        if not self.data:
            raise OptionError("--data is missing: say where the images are, such as --data DIR, or --data digits")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise OptionError(f"--device {self.device}: must be auto, cpu, cuda or cuda:N")
        if self.bf16 and self.fp16:
            raise OptionError("--fp16: not together with --bf16")
        if self.fp16 and self.device == "cpu":
            raise OptionError("--fp16: on a GPU only; on the CPU use --bf16")
        if self.nesterov and self.momentum == 0:
            raise OptionError("--nesterov needs a --momentum greater than 0")
        if self.milestones and self.schedule != "step":
            raise OptionError(f"--milestones are of --schedule step, not of {self.schedule}")
        if self.warmup_epochs >= self.epochs:
            raise OptionError(f"--warmup-epochs {self.warmup_epochs:g}: must be less than --epochs {self.epochs}")
        self.milestone_epochs()

    def milestone_epochs(self) -> tuple[float, ...]:
        """The epochs at which a step schedule falls."""
        if not self.milestones:
            return (self.epochs / 2, self.epochs * 3 / 4)
        try:
            epochs = tuple(float(part) for part in self.milestones.split(","))
        except ValueError:
            raise OptionError(f"--milestones {self.milestones}: must be epochs, such as 30,60,80") from None
        if list(epochs) != sorted(set(epochs)) or not all(0 < epoch < self.epochs for epoch in epochs):
            raise OptionError(
                f"--milestones {self.milestones}: must rise, and lie between 0 and --epochs {self.epochs}"
            )
        return epochs

    def image_size(self) -> int:
        """The side of the images: as asked, or what the network was made for."""
        return self.size if self.size is not None else 32 if "cifar" in self.model else 224


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`. Options not given are left out of the result: see `from_arguments`."""
    kinds = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str}
    for f in fields(TrainOptions):
        text = f.metadata["help"]
        if f.default not in (None, "", False, True):
            text += f" (default: {f.default})"
        if "bool" in str(f.type):
            if f.default is False:
                parser.add_argument(flag(f.name), action="store_true", default=argparse.SUPPRESS, help=text)
            else:
                action = argparse.BooleanOptionalAction
                parser.add_argument(flag(f.name), action=action, default=argparse.SUPPRESS, help=text)
            continue
        metavar = f.metadata.get("metavar", "N" if "int" in str(f.type) else "X")
        parser.add_argument(
            flag(f.name),
            type=kinds[str(f.type)],
            choices=f.metadata.get("choices"),
            default=argparse.SUPPRESS,
            metavar=None if "choices" in f.metadata else metavar,
            help=text,
        )


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """The options that stood on the command line."""
    return {f.name: getattr(namespace, f.name) for f in fields(TrainOptions) if hasattr(namespace, f.name)}


def resumed(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> TrainOptions:
    """The options of a run that goes on: those of its checkpoint, with what may change taken from `asked`.

    Raises OptionError when `asked` would change what the run computes.
    """
    merged = dict(saved)
    free = {f.name for f in fields(TrainOptions) if f.metadata.get("free")}
    for name, value in asked.items():
        if name not in free and saved.get(name) != value:
            raise OptionError(
                f"{flag(name)} {value}: the run to resume was started with {saved.get(name)}; "
                "leave the option out, or choose another --out for a new run"
            )
        merged[name] = value
    known = {f.name for f in fields(TrainOptions)}
    return TrainOptions(**{name: value for name, value in merged.items() if name in known})


def plain(options: TrainOptions) -> dict[str, Any]:
    """The options as plain values, for checkpoints and JSON."""
    return asdict(options)
