"""Trained networks as they are found: in a checkpoint of a run, in a file of `fused-resnet export`, or as weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.inference import InferenceModule, load_inference, optimize_for_inference
from fused_resnet.inference.file import InferenceFileError, is_inference_file
from fused_resnet.models.weights import load_weights
from fused_resnet.train import checkpoint, networks
from fused_resnet.train.errors import CheckpointError, OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PREPROCESS: dict[str, tuple[type, ...]] = {
    "size": (int,), "resize_ratio": (int, float), "grayscale": (bool,), "mean": (list,), "std": (list,),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A network in eval mode as the training code built it.

    Attributes:
        name: of its constructor.
        model: the network.
        about: "network", and from a checkpoint "classes" and "preprocess": what an exported file keeps of it.
    """

    name: str
    model: nn.Module
    about: Mapping[str, Any]

    def optimized(self, dtype: torch.dtype | None = None) -> InferenceModule:
        """Folded for inference."""
        size = self.about["preprocess"]["size"] if "preprocess" in self.about else None
        example = None if size is None else torch.zeros(2, 3, size, size)
        return optimize_for_inference(self.model, dtype=dtype, example_input=example)


def of_checkpoint(path: Path) -> Trained:
    """The network of a checkpoint, or of the best one in the folder of a run.

    Raises:
        CheckpointError: it is missing, damaged, or does not fit its own network.
    """
    path = in_folder(path)
    state = checkpoint.load(path)
    about = {key: state[key] for key in ("network", "classes", "preprocess")}
    try:
        model = networks.build(about["network"], len(about["classes"]))
        model.load_state_dict(state["model"])
    except (OptionError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit this version ({str(error).splitlines()[0]})") from None
    return Trained(about["network"], model.eval(), about)


def of_weights(name: str, weights: Path | None, classes: int) -> Trained:
    """A network of this package with the weights of a state_dict; None: with random ones.

    Raises:
        OptionError: there is no such network.
        CheckpointError: the weights are missing, damaged, or of another network.
    """
    model = networks.build(name, classes)
    try:
        load_weights(model, weights)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"--weights {weights}: {str(error).splitlines()[0]}") from None
    return Trained(name, model.eval(), {"network": name})


def of_file(path: Path, device: torch.device | None = None) -> InferenceModule:
    """What `fused-resnet export` or `fused_resnet.save_inference` wrote.

    Raises:
        CheckpointError: it is missing, damaged or of a later version.
    """
    try:
        return load_inference(path, device=device)
    except InferenceFileError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def for_images(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], list[str], dict[str, Any]]:
    """What classifies images: the network, the classes, and how images are prepared. On a CPU it is folded.

    Raises:
        CheckpointError: as above, or an exported file that knows neither classes nor preparation.
    """
    if is_inference_file(path):
        module = of_file(path, device)
        return module, *_described(path, module.metadata)
    trained = of_checkpoint(path)
    model = trained.optimized() if device.type == "cpu" else trained.model.to(device)
    return model, trained.about["classes"], trained.about["preprocess"]


def in_folder(path: Path) -> Path:
    """The best checkpoint in the folder of a run; a file is itself."""
    if not os.path.isdir(path):  # of a name that no system takes, Path would raise
        return path
    return next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), path / "best.pt")


def _described(path: Path, metadata: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    classes, how = metadata.get("classes"), metadata.get("preprocess")
    if classes is None or how is None:
        raise CheckpointError(
            f"{path}: does not say its classes and how images are prepared; export it with --checkpoint"
        )
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path}: its classes are not a list of names")
    good = isinstance(how, dict) and all(type(how.get(key)) in types for key, types in _PREPROCESS.items())
    if not good or not how["size"] >= 1 or not how["resize_ratio"] >= 1 or not _channels(how):
        raise CheckpointError(f"{path}: what it says of the preparation of images makes no sense")
    return classes, how


def _channels(how: Mapping[str, Any]) -> bool:
    """Whether mean and deviation are three numbers each."""
    return all(len(how[key]) == 3 and all(type(n) in (int, float) for n in how[key]) for key in ("mean", "std"))
