"""Layers for models of one's own: a batch norm with an activation, and a convolution before it."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fused_resnet.nn import _stages
from fused_resnet.nn.guard import (
    PLAIN_OR_NONE,
    FusedUnit,
    pair,
    parameters_of,
    why_stock,
    why_stock_norm_state,
    why_stock_residual,
)
from fused_resnet.ops._activation import apply_activation, check_activation

Size = int | tuple[int, int]


class BatchNormAct2d(FusedUnit):
    """`act(batch_norm(x) + residual)` as one layer, with the state_dict keys of ``nn.BatchNorm2d``.

    It is not a subclass of torch's batch norm: tools that rebuild those (``convert_sync_batchnorm``) would drop the
    activation silently. Under data parallelism each process keeps its own statistics, and
    ``torch.optim.swa_utils.update_bn``, which looks for torch's batch norms, passes it over.

    Args:
        num_features: channels C of the input of shape (N, C, H, W).
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        act: "identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh" or "silu". "prelu" adds the parameter
            `act_weight` of shape (C,), 0.25 at first.
        negative_slope: of "leaky_relu".
        device, dtype: of the parameters and statistics.

    Raises:
        ValueError: unknown `act`; one value per channel in training.
    """

    _version = 2  # state_dict version of nn.BatchNorm2d: with num_batches_tracked
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    act_weight: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: str = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.act = act
        self.negative_slope = negative_slope

        def parameter() -> nn.Parameter:
            return nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))

        self.register_parameter("weight", parameter() if affine else None)
        self.register_parameter("bias", parameter() if affine else None)
        self.register_parameter("act_weight", parameter() if act == "prelu" else None)
        check_activation(type(self).__name__, act, self.act_weight)
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype) if tracked else None)
        self.register_buffer(
            "num_batches_tracked", torch.tensor(0, device=device, dtype=torch.long) if tracked else None
        )
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forgets every batch."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Sets weight 1, bias 0 and prelu's slope 0.25, and forgets every batch."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0), (self.act_weight, 0.25)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` (N, C, H, W); `residual` of the same shape and dtype, or whatever may be added to it."""
        if is_scripting():  # noqa: SIM108  (the script compiler would compile both sides of a ternary)
            y = self._forward_stock(x, residual)
        else:
            y = self._choose(x, residual)
        return y

    def why_stock_children(self) -> str | None:
        """It has none: its own parameters and statistics must be plain."""
        state = self.__dict__
        reason = why_stock_norm_state(state)
        if reason is None and type(parameters_of(state).get("act_weight", 0)) not in PLAIN_OR_NONE:
            reason = "has an act_weight that is pruned, computed or a tensor subclass"
        return reason

    def _choose(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if why_stock(self, x) is not None or (residual is not None and why_stock_residual(x, residual) is not None):
            return self._forward_stock(x, residual)
        return _stages.norm_act(
            x, self, residual, act=self.act, negative_slope=self.negative_slope, act_weight=self.act_weight
        )

    def _forward_stock(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        traced = not isinstance(x, Tensor)  # by torch.fx, which follows no branch that depends on x
        if not traced and x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        momentum = self.momentum
        factor = 0.0 if momentum is None else momentum
        counter = self.num_batches_tracked
        if self.training and self.track_running_stats and counter is not None and momentum is None:
            factor = 1.0 / (float(counter) + 1.0)
        given = not self.training or self.track_running_stats
        y = F.batch_norm(
            x,
            self.running_mean if given else None,
            self.running_var if given else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        # Only now: a refused input changes nothing.
        if self.training and self.track_running_stats and counter is not None and not traced:
            counter.add_(1)
        if residual is not None:
            y = y + residual
        return apply_activation(y, self.act, self.negative_slope, self.act_weight)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, act={self.act!r}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if (version is None or version < 2) and self.num_batches_tracked is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0, dtype=torch.long))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class ConvBNAct2d(FusedUnit):
    """`act(bn(conv(x)) + residual)` with plain children `conv` and `bn`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as in ``nn.Conv2d``; no bias by default,
            because the batch norm takes it away.
        padding: None keeps the extent at stride 1 for odd kernels: ``dilation * (kernel_size - 1) // 2``.
        eps, momentum: of the batch norm.
        act, negative_slope: as in `BatchNormAct2d`; "prelu" adds the parameter `act_weight` of shape (out_channels,).

    Raises:
        ValueError: unknown `act`; whatever ``nn.Conv2d`` raises.
    """

    fused_convs: ClassVar[tuple[str, ...]] = ("conv",)
    fused_norms: ClassVar[tuple[str, ...]] = ("bn",)
    act_weight: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            kernel, spread = pair(kernel_size), pair(dilation)
            padding = (spread[0] * (kernel[0] - 1) // 2, spread[1] * (kernel[1] - 1) // 2)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = act
        self.negative_slope = negative_slope
        slope = nn.Parameter(torch.full((out_channels,), 0.25, device=device, dtype=dtype)) if act == "prelu" else None
        self.register_parameter("act_weight", slope)
        check_activation(type(self).__name__, act, slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` (N, in_channels, H, W); `residual` of the output's shape and dtype, or whatever may be added to it."""
        if is_scripting():  # noqa: SIM108  (the script compiler would compile both sides of a ternary)
            y = self._forward_stock(x, residual)
        else:
            y = self._choose(x, residual)
        return y

    def _choose(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if why_stock(self, x) is not None:
            return self._forward_stock(x, residual)
        z = _stages.conv(x, self.conv)
        if residual is not None and why_stock_residual(z, residual) is not None:
            y = self.bn(z) + residual
            return apply_activation(y, self.act, self.negative_slope, self.act_weight)
        return _stages.norm_act(
            z, self.bn, residual, act=self.act, negative_slope=self.negative_slope, act_weight=self.act_weight
        )

    def _forward_stock(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y = y + residual
        return apply_activation(y, self.act, self.negative_slope, self.act_weight)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"
