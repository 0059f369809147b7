"""The command line: `fused-resnet`, also `python -m fused_resnet`.

A mistake in the options ends with one clear line and exit code 2; broken data or checkpoints with one line and 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fused_resnet import _extension, quick_bench
from fused_resnet._version import __version__
from fused_resnet.train import compare, export, predict, run, serve_bench
from fused_resnet.train.errors import OptionError, UserError
from fused_resnet.train.options import add_arguments, given


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        # A shortened option would change its meaning when a new one with the same beginning appears.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage first, and bury the one line that helps.
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Command(_Parser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        # Left to the parser above it, an unknown option would be reported without the command's name.
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except UserError as error:
        print(f"fused-resnet {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"fused-resnet {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fused-resnet", description="Fused training and inference of ResNets for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fused-resnet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)

    info = commands.add_parser("info", help="what was built, and what runs here")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    train = commands.add_parser(
        "train",
        help="train a network on images",
        description="Trains a network on a folder of images by class, on MNIST or CIFAR files, or on 'digits'. "
        "A run that was killed goes on with --resume --out DIR, with the same losses.",
    )
    add_arguments(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.set_defaults(run=_train)

    classify = commands.add_parser("predict", help="classify images with a checkpoint")
    classify.add_argument("files", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    classify.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a checkpoint, the folder of a run, or an exported file"
    )
    classify.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to show (default: 5)")
    classify.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU the kernels can use)"
    )
    classify.add_argument("--json", action="store_true", help="as JSON")
    classify.set_defaults(run=_predict)

    save = commands.add_parser(
        "export",
        help="write a trained network to one file for inference",
        description="Folds a trained network for inference on CPUs and writes it to one file, with its classes and how "
        "images are prepared. 'fused-resnet predict' and fused_resnet.load_inference read it.",
    )
    export.add_arguments(save)
    save.set_defaults(run=export.main)

    serve = commands.add_parser(
        "serve-bench",
        help="latency and throughput of a network under several callers",
        description="Calls a network from several threads at once and prints latencies and images per second, ours "
        "against eager PyTorch.",
    )
    serve_bench.add_arguments(serve)
    serve.set_defaults(run=serve_bench.main)

    convert = commands.add_parser(
        "convert",
        help="say what convert() fuses in a torchvision or timm network",
        description="Builds a network of torchvision or timm, converts it, checks that it still computes the same, and "
        "says what was fused and what was left, and why.",
    )
    convert.add_argument("network", metavar="NAME", help="such as torchvision:resnet50 or timm:resnet50d")
    convert.add_argument("--weights", metavar="PATH", help="a state_dict to load before and to check with")
    convert.add_argument("--size", type=_positive, default=224, metavar="N", help="side of the images (default: 224)")
    convert.add_argument("--json", action="store_true", help="as JSON")
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", help="how much faster is a network here than with stock PyTorch?")
    quick_bench.add_arguments(bench)
    bench.set_defaults(run=quick_bench.main)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number greater than 0")
    return int(text)


def _info(arguments: argparse.Namespace) -> int:
    info = _extension.build_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return 0
    width = max(map(len, info))
    for key, value in info.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else value
        print(f"{key:{width}}  {'-' if text is None else text}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    summary = run.start_or_resume(given(arguments), resume=arguments.resume)
    if summary.stopped:
        return 130
    print(
        f"test accuracy {summary.test_accuracy:.2%} (best {summary.best_accuracy:.2%}) after {summary.epochs} epochs; "
        f"checkpoints and logs in {summary.out}"
    )
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    paths = predict.collect(arguments.files)
    try:
        device = _extension.pick_device(arguments.device)
    except ValueError as error:
        raise OptionError(f"--device {error}") from None
    classifier = predict.Classifier(Path(arguments.checkpoint), device=device)
    predictions = list(classifier(paths, top=arguments.top))
    if arguments.json:
        print(json.dumps([p.plain() for p in predictions], indent=2))
    else:
        print(predict.table(predictions))
    return 1 if any(p.error is not None for p in predictions) else 0


def _convert(arguments: argparse.Namespace) -> int:
    report = compare.compare(arguments.network, weights=arguments.weights, size=arguments.size)
    print(json.dumps(report.plain(), indent=2) if arguments.json else report.text())
    return 0 if report.equal else 1
