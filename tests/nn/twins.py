"""Runs one module three ways (fused, stock, and stock in fp64) and compares everything that comes out.

Also the modules that the tests of CPU and GPU run so. No oracle is imported: tests/gpu must not be skipped without one.
"""

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet as fr

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ("BasicBlock", "Bottleneck")
# Input channels of blocks that stride. Not 5 to 7: there ATen's fp32 weight gradient of a 1x1 convolution with stride 2
# is wrong on AVX2 (torch 2.13, channels_last, even extents: half of it noise, another one each time). Extents are odd
# for the same reason.
STRIDED = 4


def make(name: str, inplanes: int = 8, planes: int = 2, stride: int = 1, shortcut: bool = True, **options: Any) -> Any:
    """A block of either kind with four times `planes` channels at its end."""
    block = getattr(fr.nn, name)
    width = planes * 4
    downsample = None
    if stride != 1 or inplanes != width or shortcut:
        downsample = nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return randomise(block(inplanes, width // block.expansion, stride, downsample, **options))


def small(**options: Any) -> Any:
    """A ResNet of two stages, with one block each."""
    model = fr.models.ResNet(fr.nn.Bottleneck, [1, 1, 1, 1], num_classes=7, **options)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 7)
    return model


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


NARROW_DRAWS = 9


def assert_fused_equals_stock(module: nn.Module, x: Tensor, *others: Tensor, requires_grad: bool = True) -> int:
    """The fused result is as near to fp64 as the stock one is, quantity by quantity; returns how many inputs it tried.

    Near a kink of relu two right answers may differ by a whole gradient element, so errors are compared as norms, and
    in a narrow dtype, where a few elements lie that near, as medians over several inputs of which `x` is the first.
    Gradients behind a batch norm cancel, and the gradient of one of two channels is one random error: eight times the
    stock error is rare and no sign of a mistake, while a wrong formula errs by the whole in fp64. The floor counts
    rounding errors where the stock error happens to be none, and the reference's own in fp64.
    """
    exact = copy.deepcopy(module).double()
    draws = [x]
    if x.dtype.itemsize == 2:
        draws += [torch.randn_like(x) for _ in range(NARROW_DRAWS - 1)]
    length = x.numel() // x.shape[1]
    floor = torch.finfo(x.dtype).eps * (1024 if x.dtype == torch.float64 else 8 + length**0.5)
    errors: dict[str, list[tuple[float, float]]] = {}
    for draw in draws:
        inputs = (draw, *others)
        with fr.nn.stock():
            want = run(copy.deepcopy(exact), *(t.double() for t in inputs), requires_grad=requires_grad)
            stock = run(copy.deepcopy(module), *inputs, requires_grad=requires_grad)
        fused = run(copy.deepcopy(module), *inputs, requires_grad=requires_grad)
        assert fused.keys() == stock.keys()
        for name, expected in want.items():
            got, eager = fused[name], stock[name]
            assert got.dtype == eager.dtype, name
            assert got.shape == eager.shape, name
            if not got.is_floating_point():
                assert torch.equal(got, eager), name
                continue
            assert torch.equal(got.isfinite(), eager.isfinite()), name
            size = expected.norm() + 1e-30
            pair = [float((t.double() - expected).norm() / size) for t in (got, eager)]
            errors.setdefault(name, []).append((pair[0], pair[1]))
    for name, pairs in errors.items():
        error, eager_error = (statistics.median(side) for side in zip(*pairs, strict=True))
        allowed = 8 * eager_error + floor
        assert error <= allowed, f"{name}: error {error:.3g} of the whole, allowed {allowed:.3g}"
    return len(draws)
