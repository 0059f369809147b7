"""The stem of a ResNet: batch normalisation, activation and max-pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_resnet.ops import _native, _stock
from fused_resnet.ops._activation import activation_code


def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.01,
    act_weight: Tensor | None = None,
) -> Tensor:
    """Batch normalisation, activation and the 3x3 max-pool of stride 2 and padding 1 in one pass.

    `y = max_pool2d(act(batch_norm(x)), 3, stride=2, padding=1)`; the normalised tensor is never written.

    Args:
        x: `(N, C, H, W)`; other arguments as in `batch_norm_act`.

    Returns:
        y: `(N, C, (H - 1) // 2 + 1, (W - 1) // 2 + 1)`, dtype and layout of `x`.

    Mutates `running_mean` and `running_var` when training. Saves for backward `x`, the statistics, the parameters and
    one byte per output element (the winner's place in its window).

    Gradients: for `x`, `weight`, `bias` and `act_weight`; ties go to the first element of the window, a NaN wins, as in
    `torch.nn.functional.max_pool2d`. Differentiable twice.

    Raises:
        ValueError, RuntimeError: as `batch_norm_act`. Nothing has been changed then.

    Numerics: as `batch_norm_act`.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, conv1 to conv2_x.
    """
    if _native.C is None:
        _native.check_types(batch_norm_act_max_pool, locals())
        return _stock.batch_norm_act_max_pool(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            negative_slope=negative_slope,
            act_weight=act_weight,
        )
    compiling = torch.compiler.is_compiling()
    op: Callable[..., Tensor] = (
        torch.ops.fused_resnet.batch_norm_act_max_pool.default if compiling else _native.C.batch_norm_act_max_pool
    )
    try:
        return op(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            act_weight,
            training,
            momentum,
            eps,
            activation_code("batch_norm_act_max_pool", act),
            negative_slope,
        )
    except TypeError:
        _native.check_types(batch_norm_act_max_pool, locals())
        raise
