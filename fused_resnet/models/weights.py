"""Loads weights into a model: all of them, or none and one error that lists what is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

# Where training scripts keep the weights inside a checkpoint (ours and torchvision's; timm's).
_WRAPPERS = ("model", "state_dict")
_COUNTER = "num_batches_tracked"


@runtime_checkable
class WeightsEntry(Protocol):
    """An entry of a torchvision `WeightsEnum`, known by what it offers."""

    @property
    def url(self) -> str: ...

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]: ...


Weights = str | os.PathLike[str] | Mapping[str, Any] | WeightsEntry | None


def load_weights(model: nn.Module, weights: Weights, progress: bool = True) -> None:
    """Load weights into `model`, in place.

    Args:
        model: gets the weights; parameters keep their dtype and device.
        weights: the path of a file that `torch.save` wrote (a state_dict, or a checkpoint that holds one under "model"
            or "state_dict"); a state_dict; an entry of a torchvision weights enum, whose file torch.hub fetches or
            finds in its cache; None leaves the model as it is. Files are read with `weights_only=True`: no code in
            them runs.
        progress: show a progress bar while fetching.
    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file is not readable as weights, could not be fetched, or keys are missing, unexpected or of
            another shape. The message lists them all, and the model is unchanged.
        TypeError: `weights` is none of the above.
    Numerics: values are copied as they are, converted to the parameter's dtype.
    """
    if weights is None:
        return
    if isinstance(weights, (str, os.PathLike)):
        source = os.fspath(weights)
        state = _read(source)
    elif isinstance(weights, Mapping):
        source, state = "the given state_dict", weights
    elif isinstance(weights, WeightsEntry):
        source, state = weights.url, _fetch(weights.url, progress)
    else:
        raise TypeError(
            "weights must be a path, a state_dict, an entry of a torchvision weights enum or None, "
            f"got {type(weights).__name__}"
        )
    model.load_state_dict(_validated(model, _unwrap(state), source))


def _read(path: str) -> Mapping[str, Any]:
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"weights: no file {path!r} (for published weights, pass an entry of a torchvision weights enum)"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything; all of it means this
        reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
        raise RuntimeError(
            f"weights: {path!r} is not a readable weights file (damaged, cut short, or not weights alone): {reason}"
        ) from error
    if not isinstance(content, Mapping):
        raise RuntimeError(f"weights: {path!r} holds a {type(content).__name__}, expected a state_dict")
    return content


def _fetch(url: str, progress: bool) -> Mapping[str, Any]:
    name = os.path.basename(urlparse(url).path)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=progress, check_hash=True, weights_only=True
        )
    except Exception as error:  # network, proxy, disk, hash and unpickling errors have no common base
        cached = os.path.join(torch.hub.get_dir(), "checkpoints", name)
        raise RuntimeError(
            f"weights: could not fetch {name} from {url} ({type(error).__name__}: {error}). "
            f"Get the file {name} another way and pass its path, weights='/path/to/{name}', or put it at {cached}"
        ) from error


def _unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        inner = state.get(key)
        if isinstance(inner, Mapping):
            return inner
    return state


def _validated(model: nn.Module, state: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The complete state to load, or one RuntimeError that lists everything that does not fit."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    if not any(key.endswith(_COUNTER) for key in state):  # files older than torch 0.4.1 have no step counters
        missing = [key for key in missing if not key.endswith(_COUNTER)]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    unexpected = [str(key) for key in state if key not in expected]
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    misfits = [misfit for key in expected if key in state and (misfit := _misfit(key, expected[key], state[key]))]
    if misfits:
        problems.append(f"not fitting: {', '.join(misfits)}")
    if problems:
        raise RuntimeError(
            f"weights: {source} does not fit {type(model).__name__}; the model is unchanged. {'; '.join(problems)}"
        )
    return {key: state.get(key, value) for key, value in expected.items()}


def _misfit(key: str, expected: Any, got: Any) -> str | None:
    if not isinstance(expected, Tensor):
        return None  # extra state: its module judges it
    if not isinstance(got, Tensor):
        return f"{key} (expected a tensor, got {type(got).__name__})"
    if got.shape != expected.shape:
        return f"{key} (expected {tuple(expected.shape)}, got {tuple(got.shape)})"
    return None
