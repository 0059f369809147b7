"""Fused training and inference of ResNets for PyTorch: the same models and numbers, faster."""

from fused_resnet import memory, models, nn, numerics, ops
from fused_resnet._extension import available as is_available
from fused_resnet._extension import build_info
from fused_resnet._version import __version__
from fused_resnet.convert import convert

__all__ = ["__version__", "build_info", "convert", "is_available", "memory", "models", "nn", "numerics", "ops"]
