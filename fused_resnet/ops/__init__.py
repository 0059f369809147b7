"""Fused functions: batch normalisation with residual, activation, pooling and convolution, forward and backward."""

from fused_resnet.ops._activation import ACTIVATIONS
from fused_resnet.ops.batch_norm import add_act, batch_norm_act, dual_batch_norm_act
from fused_resnet.ops.conv import batch_norm_act_conv, conv2d, conv_bn_act
from fused_resnet.ops.pool import batch_norm_act_max_pool

__all__ = [
    "ACTIVATIONS",
    "add_act",
    "batch_norm_act",
    "batch_norm_act_conv",
    "batch_norm_act_max_pool",
    "conv2d",
    "conv_bn_act",
    "dual_batch_norm_act",
]
