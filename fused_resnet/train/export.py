"""`fused-resnet export`: a trained network as one file for inference."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_resnet.inference import save_inference
from fused_resnet.inference.file import InferenceFileError
from fused_resnet.train import trained
from fused_resnet.train.errors import CheckpointError, OptionError


def add_source(parser: argparse.ArgumentParser, *, checkpoint: str) -> None:
    """Adds the options that say which network: `--checkpoint`, or `--model` with weights."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="PATH", help=checkpoint)
    source.add_argument("--model", metavar="NAME", help="a network of this package, such as resnet50")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="a state_dict for --model")
    parser.add_argument("--classes", type=int, metavar="N", help="of --model (default: 1000)")


def source_of(arguments: argparse.Namespace) -> trained.Trained:
    """The network that these options name.

    Raises:
        OptionError: they contradict each other.
    """
    if arguments.checkpoint is None:
        if arguments.classes is not None and arguments.classes < 1:
            raise OptionError(f"--classes {arguments.classes}: must be greater than 0")
        return trained.of_weights(arguments.model, arguments.weights, arguments.classes or 1000)
    for name in ("weights", "classes"):
        if getattr(arguments, name) is not None:
            raise OptionError(f"--{name}: belongs to --model; a checkpoint has its own")
    return trained.of_checkpoint(arguments.checkpoint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options to `parser`."""
    add_source(parser, checkpoint="a checkpoint, or the folder of a run")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="to write, such as net.frn")
    parser.add_argument(
        "--dtype", choices=trained.DTYPES, default="float32", help="to compute in; weights are kept in float32"
    )


def main(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed options; returns the exit status."""
    if arguments.model is not None and arguments.weights is None:
        raise OptionError("--weights: needed with --model")
    source = source_of(arguments)
    module = source.optimized(trained.DTYPES[arguments.dtype])
    out: Path = arguments.out
    try:
        save_inference(module, out, metadata=source.about)
    except InferenceFileError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise OptionError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    size = out.stat().st_size / 1e6
    print(f"{out}: {source.name}, {len(module.graph.steps)} steps, {arguments.dtype}, {size:.1f} MB")
    return 0
