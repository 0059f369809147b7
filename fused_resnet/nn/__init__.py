"""Blocks and layers whose forward is fused, with torchvision's children, names and arguments."""

from fused_resnet.nn._block import set_memory
from fused_resnet.nn.blocks import BasicBlock, Bottleneck
from fused_resnet.nn.explain import explain
from fused_resnet.nn.guard import stock
from fused_resnet.nn.layers import BatchNormAct2d, ConvBNAct2d
from fused_resnet.nn.preact import PreActBasicBlock, PreActBottleneck

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "explain",
    "set_memory",
    "stock",
]
