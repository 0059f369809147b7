"""The entrances: from a trained model, and from and to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.inference import file
from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.module import DTYPES, InferenceModule


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, example_input: Tensor | None = None
) -> InferenceModule:
    """Folds a trained network into a plan of fused steps: several times fewer passes over memory, the same answers.

    Batch norms are folded into the convolutions in float64, weights are packed once, and what stands behind a
    convolution (bias, residual, activation) happens before its result leaves the registers. Any batch size and
    resolution that the model takes; each new one costs a plan, a few milliseconds. What no kernel describes runs as
    PyTorch's operator inside the plan; `.explain()` names it.

    Args:
        model: this package's, a converted one, or torchvision's, timm's or anyone's ResNet, in eval mode, on a CPU or
            an NVIDIA GPU. It is not changed and not kept.
        dtype: of the computation: float32, bfloat16, float16 or float64; default: that of the model's parameters.
            Folded weights are float32, and float64 only for a float64 model.
        example_input: (N, C, H, W), for a model that does not run on two images of 224 x 224. Its values do not matter.
    Returns:
        A module to call with images; its output has the images' dtype.
    Raises:
        TypeError: `model` is not a module; `dtype` is none of these; `example_input` is not a tensor.
        ValueError: the model is in training mode, or `torch.export` cannot capture it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"optimize_for_inference: expected dtype to be one of {', '.join(map(str, DTYPES))} or None, got {dtype!r}"
        )
    first = next((t for t in model.parameters() if t.is_floating_point()), None)
    graph = build_graph(model, example_input)
    if dtype is None:
        dtype = first.dtype if first is not None and first.dtype in DTYPES else torch.float32
    return InferenceModule(graph, dtype, device=None if first is None else first.device)


def save_inference(
    module: InferenceModule, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a folded network to one file: no code in it, with a version and a checksum; whole or not at all.

    Args:
        module: from `optimize_for_inference` or `load_inference`.
        path: of the file; one that is there is replaced.
        metadata: what JSON can hold, kept beside the network; default: the module's own.
    Raises:
        TypeError: `module` is no InferenceModule, or JSON cannot hold `metadata`.
        fused_resnet.inference.file.InferenceFileError (a ValueError): it runs an operator that files may not name.
        OSError: the file cannot be written.
    """
    if not isinstance(module, InferenceModule):
        raise TypeError(f"save_inference: expected a module of optimize_for_inference, got {type(module).__name__}")
    file.write(path, module.graph, module.dtype, dict(module.metadata if metadata is None else metadata))


def load_inference(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> InferenceModule:
    """Reads what `save_inference` wrote; weights are mapped, and packed for this machine's CPU at the first call.

    Args:
        path: of the file.
        device: where to compute; default: the CPU.
    Raises:
        fused_resnet.inference.file.InferenceFileError (a ValueError): the file is damaged, cut off, of a later version,
            or something else. Nothing in a file is executed.
        OSError: it cannot be read.
    """
    graph, dtype, metadata = file.read(path)
    return InferenceModule(graph, dtype, device=None if device is None else torch.device(device), metadata=metadata)
