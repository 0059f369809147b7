"""Which operators a file may name: functions of their arguments that read no files, draw no random numbers, change
nothing, check their operands, and never show memory that nobody wrote. What is missing here can be run, but not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_resnet.inference.operators import resolve

_NAMES = """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d linear addmm mm bmm matmul mv
    dot baddbmm addbmm einsum bilinear scaled_dot_product_attention batch_norm layer_norm group_norm instance_norm
    rms_norm native_layer_norm native_group_norm max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d relu relu6 leaky_relu prelu _prelu_kernel elu celu selu gelu silu mish
    hardtanh hardswish hardsigmoid hardshrink softshrink sigmoid log_sigmoid tanh softplus threshold glu softmax
    _softmax log_softmax _log_softmax clamp clamp_min clamp_max clip add sub rsub subtract mul multiply div divide
    true_divide floor_divide remainder fmod neg negative abs absolute sign exp exp2 expm1 log log2 log10 log1p sqrt
    rsqrt reciprocal pow square sin cos tan asin acos atan atan2 sinh cosh erf erfc floor ceil round trunc frac
    maximum minimum fmax fmin where eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and
    bitwise_or bitwise_not bitwise_xor lerp addcmul addcdiv masked_fill isnan isinf isfinite nan_to_num mean sum prod
    amax amin max min var var_mean std std_mean logsumexp norm linalg_vector_norm frobenius_norm cumsum cumprod argmax
    argmin topk sort argsort all any count_nonzero cat concat stack hstack vstack split split_with_sizes chunk
    tensor_split unbind view reshape _unsafe_view view_as reshape_as flatten unflatten permute transpose swapaxes
    movedim t numpy_T squeeze unsqueeze expand expand_as broadcast_to repeat tile repeat_interleave slice select
    narrow index index_select gather take_along_dim diagonal roll flip rot90 tril triu unfold im2col pad
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle
    pixel_unshuffle channel_shuffle meshgrid upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa clone contiguous detach
    alias lift_fresh_copy to _to_copy type_as copy zeros zeros_like ones ones_like full full_like new_zeros new_ones
    new_full scalar_tensor arange eye linspace sym_size sym_numel
"""
_ATEN = frozenset(_NAMES.split())
# Arguments 3 and 5 are the running mean, and whether it is not used but updated, which their schemas do not say.
_NORMS = ("aten.batch_norm.default", "aten.instance_norm.default")
# Not pow: a file could keep a processor busy for years with one number.
_SCALAR = frozenset(
    {f"operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "abs")}
    | {f"operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")}
    | {f"math.{name}" for name in ("ceil", "floor", "trunc")}
    | {f"torch.{name}" for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")}
)


def check_operator(target: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: it is not one of these, not an operator of this PyTorch, changes an argument, or is a function of
            numbers that gets something else.
    """
    parts = target.split(".")
    aten = len(parts) == 3 and parts[0] == "aten" and parts[1] in _ATEN
    if not aten and target not in _SCALAR:
        raise ValueError(f"expected one of the operators that files may hold, got {target!r}")
    function = resolve(target)
    if isinstance(function, torch._ops.OpOverload):
        updates = target in _NORMS and (len(args) < 6 or (args[3] is not None and args[5] is not False))
        if function._schema.is_mutable or updates:
            raise ValueError(f"expected an operator that changes nothing, got {target!r}")
    elif kwargs or any(isinstance(value, (str, tuple)) for value in args):
        raise ValueError(f"expected numbers as arguments of {target!r}, got {args!r} {dict(kwargs)!r}")
