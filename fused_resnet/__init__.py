"""Fused training and inference of ResNets for PyTorch: the same models and numbers, faster."""

from fused_resnet import memory, models, nn, numerics, ops
from fused_resnet._extension import available as is_available
from fused_resnet._extension import build_info
from fused_resnet._version import __version__
from fused_resnet.convert import convert
from fused_resnet.inference import InferenceModule, load_inference, optimize_for_inference, save_inference

__all__ = [
    "InferenceModule",
    "__version__",
    "build_info",
    "convert",
    "is_available",
    "load_inference",
    "memory",
    "models",
    "nn",
    "numerics",
    "ops",
    "optimize_for_inference",
    "save_inference",
]
