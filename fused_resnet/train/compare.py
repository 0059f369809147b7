"""`fused-resnet convert`: a network from elsewhere, converted, checked against itself, and explained."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_resnet.convert import convert
from fused_resnet.models.weights import load_weights
from fused_resnet.nn import explain
from fused_resnet.nn.explain import Explanation
from fused_resnet.train.errors import CheckpointError, OptionError, UserError

# Outputs may differ by rounding, relative to the largest output: a few hundred fp32 roundings in a row.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Report:
    """What was fused, and the largest difference of the outputs, relative to the largest output."""

    network: str
    explanation: Explanation
    difference: float
    keys_kept: bool

    @property
    def equal(self) -> bool:
        return self.keys_kept and self.difference <= _TOLERANCE

    def text(self) -> str:
        verdict = "the same" if self.equal else "NOT THE SAME"
        return (
            f"{self.explanation}\n\n{self.network}: converted and original compute {verdict} "
            f"(largest relative difference {self.difference:.1e}); "
            f"state_dict keys are {'unchanged' if self.keys_kept else 'CHANGED'}"
        )

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return {
            "network": self.network,
            "units": [row._asdict() for row in self.explanation],
            "fused": self.explanation.fused,
            "relative_difference": self.difference,
            "state_dict_keys_kept": self.keys_kept,
            "equal": self.equal,
        }


def compare(name: str, *, weights: str | None = None, size: int = 224) -> Report:
    """Builds the network `name` ("torchvision:resnet50", "timm:resnet50d"), converts a copy, and runs both."""
    torch.manual_seed(0)
    original = _build(name)
    if weights is not None:
        try:
            load_weights(original, weights)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"--weights {weights}: {error}") from None
    converted = convert(copy.deepcopy(original), inplace=True)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            expected, got = original.eval()(x), converted.eval()(x)
    except RuntimeError as error:
        raise UserError(f"{name}: cannot run on {size}x{size} images ({str(error).splitlines()[0]})") from None
    difference = (got - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    keys_kept = list(original.state_dict()) == list(converted.state_dict())
    return Report(name, explain(converted, x), float(difference), keys_kept)


def _build(name: str) -> nn.Module:
    library, _, network = name.partition(":")
    if library not in ("torchvision", "timm") or not network:
        raise OptionError(f"{name}: say torchvision:NAME or timm:NAME, such as torchvision:resnet50")
    module_name = "torchvision.models" if library == "torchvision" else "timm"
    try:
        module = importlib.import_module(module_name)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{name}: {library} cannot be imported ({str(error).splitlines()[0]})") from None
    try:
        if library == "torchvision":
            model = module.get_model(network, weights=None)
        else:
            model = module.create_model(network, pretrained=False)
    except (ValueError, RuntimeError, TypeError) as error:
        raise OptionError(f"{name}: {library} cannot build it ({str(error).splitlines()[0]})") from None
    if not isinstance(model, nn.Module):
        raise OptionError(f"{name}: is not a network")
    return model
