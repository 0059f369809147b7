# ruff: noqa: N999  (the name of an extension module)
"""Types of the compiled extension. The operators' arguments are those of docs/architecture.md, in that order."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

class Kernel(TypedDict("Kernel", {"pass": str})):
    op: str
    dtype: str
    isa: str
    name: str
    supported: bool  # by this CPU

class BuildConfig(TypedDict):
    compiler: str
    cpp_standard: int
    torch_version: str
    isas: list[str]
    cuda: bool  # built with CUDA kernels

def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: int,
    negative_slope: float,
    /,
) -> Tensor: ...
def batch_norm_act_dual(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual_training: bool,
    residual_momentum: float,
    residual_eps: float,
    act: int,
    negative_slope: float,
    /,
) -> Tensor: ...
def residual_block(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    training: Sequence[bool],
    momenta: Sequence[float],
    eps: Sequence[float],
    geometry: Sequence[int],
    counts: Sequence[int],
    downsample: bool,
    recompute: bool,
    preact: bool,
    /,
) -> Tensor: ...
def batch_norm_act_conv(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: int,
    negative_slope: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    /,
) -> Tensor: ...
def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act_weight: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: int,
    negative_slope: float,
    /,
) -> Tensor: ...
def add_act(x: Tensor, residual: Tensor, act_weight: Tensor | None, act: int, negative_slope: float, /) -> Tensor: ...
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    /,
) -> Tensor: ...
def conv_supported(
    shape: Sequence[int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    small: bool,
    /,
) -> bool: ...
def native_convolution(dtype: torch.dtype, /) -> bool: ...
def build_config() -> BuildConfig: ...
def why_no_cuda(index: int, /) -> str | None: ...  # RuntimeError: an error that may pass
def detected_isa() -> str: ...
def current_isa() -> str: ...
def built_isas() -> list[str]: ...
def set_isa_cap(name: str, /) -> None: ...
def kernel_table() -> list[Kernel]: ...
def set_verbose(on: bool, /) -> None: ...
def last_level_cache_bytes() -> int: ...
def isa_note() -> str | None: ...
def set_winograd(allowed: bool, /) -> None: ...
def winograd() -> bool: ...
def set_split_bfloat16(allowed: bool | None, /) -> None: ...
def split_bfloat16() -> bool | None: ...
def set_pool_enabled(enabled: bool, /) -> None: ...
def pool_enabled() -> bool: ...
def trim_pool() -> None: ...
def pool_stats() -> dict[str, int]: ...
