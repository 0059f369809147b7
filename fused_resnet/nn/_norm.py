"""Reads one ``nn.BatchNorm2d`` (or a module with the same attributes) the way ``_BatchNorm.forward`` does.

In two halves, because stock PyTorch counts the batch before it looks at it: `operands` reads and changes nothing,
`count` is called after the operator has accepted the batch.
"""

from typing import NamedTuple

from torch import Tensor, nn

from fused_resnet.nn.guard import parameters_of


class NormOperands(NamedTuple):
    """What an operator of `fused_resnet.ops` wants to know about one batch normalisation."""

    running_mean: Tensor | None  # (C,)
    running_var: Tensor | None  # (C,)
    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    training: bool  # normalise with the statistics of this batch
    momentum: float
    eps: float


def operands(bn: nn.Module) -> NormOperands:
    """Reads `bn`; changes nothing.

    Batch statistics are used in training, and in evaluation when there are no running ones. Running statistics are
    updated only in training with `track_running_stats`; `momentum=None` is the cumulative average of all batches.
    """
    state = bn.__dict__
    parameters, buffers = parameters_of(state), state["_buffers"]
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    training, momentum = state["training"], state["momentum"]
    if training:
        if not state["track_running_stats"]:
            running_mean = running_var = None
            momentum = momentum or 0.0
        elif momentum is None:
            counter = buffers["num_batches_tracked"]
            momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    else:
        training = running_mean is None and running_var is None
        momentum = momentum or 0.0
    return NormOperands(
        running_mean, running_var, parameters["weight"], parameters["bias"], training, momentum, state["eps"]
    )


def count(bn: nn.Module) -> None:
    """Counts the batch that `bn` has just normalised."""
    state = bn.__dict__
    if state["training"] and state["track_running_stats"]:
        counter = state["_buffers"]["num_batches_tracked"]
        if counter is not None:
            counter.add_(1)
