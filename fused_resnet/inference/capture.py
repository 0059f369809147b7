"""A trained network as a graph of fused steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fused_resnet.inference.export import Captured, capture
from fused_resnet.inference.fold import fold
from fused_resnet.inference.graph import Graph
from fused_resnet.inference.interpret import Interpreter
from fused_resnet.inference.lower import lower


def build_graph(model: nn.Module, example_input: Tensor | None = None) -> Graph:
    """What `model` computes in eval mode, as steps with the batch norms folded in.

    Args:
        model: with one input of shape (N, C, H, W); float32, float64 or narrower, on any device. It is not altered, and
            the graph shares no memory with it.
        example_input: a batch that the model takes, of which only the shape matters; None: one that the first
            convolution's channels suggest.

    Returns:
        The graph, with tensors in float32, or float64 for a float64 model.

    Raises:
        TypeError: not a module, or an example that is not a tensor.
        ValueError: a model in training mode, or one that cannot be captured; the message says why.
    """
    captured = capture(model, example_input)
    graph = fold(lower(captured), captured.wide_dtype)
    _check_shapes(graph, captured)
    if graph.extent is None and not _runs_at_other_extents(graph, captured):
        graph = replace(graph, extent=(captured.example[2], captured.example[3]))
    return graph


def _check_shapes(graph: Graph, captured: Captured) -> None:
    """Tried without numbers, because a plan knows none."""
    images = torch.empty(captured.example, device="meta")
    try:
        Interpreter(graph, captured.wide_dtype, "meta")(images)
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"build_graph: expected shapes that depend on no numbers of the images; {why}") from error


def _runs_at_other_extents(graph: Graph, captured: Captured) -> bool:
    """Tried without numbers: a linear layer after a flatten, say, takes one extent only."""
    batch, channels, rows, columns = captured.example
    images = torch.empty((batch, channels, rows + 32, columns + 64), device="meta")
    try:
        Interpreter(graph, captured.wide_dtype, "meta")(images)
    except Exception:
        return False
    return True
