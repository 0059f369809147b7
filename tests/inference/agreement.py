"""A graph against the model it was made from: exact in float64, and in float32 as near as PyTorch itself."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.graph import Graph, Step, Stock
from fused_resnet.inference.interpret import run
from fused_resnet.nn.guard import stock

EXACT = 1e-10  # of the largest number: float64's roundings in another order, through tens of layers
SHAPES = ((2, 33, 40), (1, 32, 32), (3, 41, 64))


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode with batch norms as training leaves them, not as they begin."""
    for module in model.modules():
        for name, low, high in (("running_var", 0.5, 2.0), ("running_mean", -0.5, 0.5)):
            statistic = getattr(module, name, None)
            if isinstance(statistic, Tensor):
                statistic.uniform_(low, high)
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        nn.init.uniform_(parameter, -1.0, 1.5)
    return model.eval()


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, dict):
        return list(output.values())
    return [output] if isinstance(output, Tensor) else list(output)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest number; NaN and infinities must stand where they should."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[got.isinf()], expected[expected.isinf()])
    if not finite.any():
        return 0.0
    return float((got - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-30))


def check(
    model: nn.Module,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    channels: int = 3,
    example: Tensor | None = None,
) -> Graph:
    """Builds graphs of the model in float32 and float64, compares at every (N, H, W), returns the float32 one."""
    exact = copy.deepcopy(model).double()
    graph, exact_graph = build_graph(model, example), build_graph(exact, example)
    assert kinds(graph) == kinds(exact_graph)
    for batch, rows, columns in shapes:
        x = torch.randn(batch, channels, rows, columns)
        with torch.no_grad(), stock():
            expected, eager = exact(x.double()), model(x)
        got, single = run(exact_graph, x.double(), torch.float64), run(graph, x)
        assert type(got) is type(expected)
        if isinstance(expected, dict):
            assert isinstance(got, dict)
            assert list(got) == list(expected)
        for parts in zip(flat(expected), flat(eager), flat(got), flat(single), strict=True):
            reference, own, double, float_ = parts
            assert double.dtype == torch.float64
            assert error(double, reference) <= EXACT
            allowed = max(2 * error(own, reference), 4 * torch.finfo(torch.float32).eps)
            assert error(float_, reference) <= allowed
    return graph


def kind(step: Step) -> str:
    return step.target if isinstance(step, Stock) else type(step).__name__


def kinds(graph: Graph) -> list[str]:
    return [kind(step) for step in graph.steps]
