"""Runs one module three ways (fused, stock, and stock in fp64) and compares everything that comes out."""

import copy

import torch
from torch import Tensor, nn

import fused_resnet as fr


def randomise(module: nn.Module) -> nn.Module:
    """Gives every batch norm weights and statistics that matter; returns the module."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) or hasattr(norm, "running_var"):
            for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5)):
                if isinstance(tensor, Tensor):
                    nn.init.uniform_(tensor, low, high)
            if norm.running_mean is not None:
                norm.running_mean.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.5, 1.5)
    return module


def run(module: nn.Module, x: Tensor, *others: Tensor, requires_grad: bool = True) -> dict[str, Tensor]:
    """Forward and backward on copies; returns the output, all gradients and all buffers."""
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad) for t in (x, *others)]
    y = module(*inputs)
    result = {"output": y.detach()}
    if y.requires_grad:
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
        y.backward(weights)
    for i, tensor in enumerate(inputs):
        if tensor.grad is not None:
            result[f"grad_input_{i}"] = tensor.grad
    result.update({f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None})
    result.update({f"buffer {name}": b.clone() for name, b in module.named_buffers()})
    return result


def assert_fused_equals_stock(module: nn.Module, x: Tensor, *others: Tensor, requires_grad: bool = True) -> None:
    """The fused result is as near to fp64 as the stock one is, quantity by quantity.

    Near a kink of relu two right answers may differ by a whole gradient element, so errors are compared as norms.
    Gradients behind a batch norm cancel, and the gradient of one of two channels is one random error: eight times the
    stock error is rare and no sign of a mistake, while a wrong formula errs by the whole in fp64. The floor counts
    rounding errors where the stock error happens to be none, and the reference's own in fp64.
    """
    exact = copy.deepcopy(module).double()
    with fr.nn.stock():
        want = run(exact, x.double(), *(t.double() for t in others), requires_grad=requires_grad)
        stock = run(copy.deepcopy(module), x, *others, requires_grad=requires_grad)
    fused = run(copy.deepcopy(module), x, *others, requires_grad=requires_grad)
    assert fused.keys() == stock.keys()
    floor = torch.finfo(x.dtype).eps * (1024 if x.dtype == torch.float64 else 16)
    for name, expected in want.items():
        got, eager = fused[name], stock[name]
        assert got.dtype == eager.dtype, name
        assert got.shape == eager.shape, name
        if not got.is_floating_point():
            assert torch.equal(got, eager), name
            continue
        assert torch.equal(got.isfinite(), eager.isfinite()), name
        size = expected.norm() + 1e-30
        allowed = 8 * (eager.double() - expected).norm() + floor * size
        error = (got.double() - expected).norm()
        assert error <= allowed, f"{name}: error {error / size:.3g} of the whole, allowed {allowed / size:.3g}"
