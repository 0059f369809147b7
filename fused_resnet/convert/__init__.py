"""Brings fused units into a model that someone already has: `fused_resnet.convert`."""

from fused_resnet.convert.model import convert

__all__ = ["convert"]
