"""Blocks, whole models, autocast, GradScaler and convert on the GPU: as near to fp64 as stock PyTorch is."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from tests.nn.twins import BLOCKS, DTYPES, STRIDED, assert_fused_equals_stock, make, randomise, small

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

SIDES: dict[str, Callable[[], AbstractContextManager[object]]] = {"fused": nullcontext, "stock": fr.nn.stock}
NARROW_FACTOR, NARROW_SLACK = 1.5, 2e-2  # as bench/models.py allows: of eager's own error against fp32, and on top


def _assert_fused(call: Callable[[], object]) -> None:
    calls = testing.count_batch_norms(call)
    assert calls.fused, "nothing ran fused"
    assert not calls.stock, f"{calls.stock} batch norms ran stock"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_trains_as_stock(name: str, stride: int, channels_last: bool, dtype: torch.dtype) -> None:
    channels = 8 if stride == 1 else STRIDED
    block = make(name, inplanes=channels, stride=stride, shortcut=stride == 2).to(dtype)
    x = testing.draw((3, channels, 13, 17), dtype)
    if channels_last:
        block, x = block.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    assert_fused_equals_stock(block, x)
    _assert_fused(lambda: block(x))
    assert_fused_equals_stock(block.eval(), x)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_small_resnet_trains_as_stock(dtype: torch.dtype, channels_last: bool) -> None:
    """A mistake fails for every input; one of three may fall on the other side of a relu by rounding."""
    failures = []
    for _ in range(3):
        model, x = randomise(small()).to(dtype), torch.randn(3, 3, 71, 65).to(dtype)
        if channels_last:
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        try:
            assert_fused_equals_stock(model, x)
        except AssertionError as error:
            failures.append(error)
    if len(failures) > (dtype == torch.float32):
        raise failures[0]
    _assert_fused(lambda: model(x))


def _soft_resnet18() -> nn.Module:
    """With small residual branches: the gradient of a fresh one is chaotic, and nothing could be said about it."""
    model = fr.models.resnet18(num_classes=10).to(memory_format=torch.channels_last).train()
    for block in model.modules():
        if isinstance(block, fr.nn.BasicBlock):
            nn.init.constant_(block.bn2.weight, 0.1)
    return model


def _images(batch: int = 16, size: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (batch,))


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_resnet18_steps_equal_stock_in_fp64() -> None:
    start, (x, target) = _soft_resnet18().double(), _images(8)
    states = {}
    for side, context in SIDES.items():
        model = copy.deepcopy(start)
        step = testing.training_step(model, list(model.parameters()), x.double(), target, context=context)
        for _ in range(2):
            step()
        states[side] = model.state_dict() | {f"grad {n}": p.grad for n, p in model.named_parameters()}
    for key, value in states["stock"].items():
        torch.testing.assert_close(states["fused"][key], value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_resnet18_under_autocast_is_as_exact_as_eager(narrow: torch.dtype, device: torch.device) -> None:
    """Three steps each with GradScaler (which bf16 does not need and must not mind)."""
    start, (x, target) = _soft_resnet18(), _images()
    losses: dict[str, list[Tensor]] = {}
    gradients, scales = {}, {}
    for side, context in {"exact": fr.nn.stock, **SIDES}.items():
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        losses[side] = []
        with context():
            for index in range(3):
                optimizer.zero_grad()
                with torch.autocast(device.type, narrow, enabled=side != "exact"):
                    loss = nn.functional.cross_entropy(model(x), target)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if index == 0:
                    gradients[side] = _gradient(model)
                scaler.step(optimizer)
                scaler.update()
                losses[side].append(loss.detach())
        scales[side] = scaler.get_scale()
        if side == "fused":
            _assert_fused(lambda m=model: m(x))
    assert scales["fused"] == scales["stock"] == 1024.0
    for what, results in (("gradient", gradients), ("losses", {k: torch.stack(v) for k, v in losses.items()})):
        errors = {side: _error(results[side], results["exact"]) for side in SIDES}
        assert errors["fused"] <= NARROW_FACTOR * errors["stock"] + NARROW_SLACK, f"{what}: {errors}"


def test_gradscaler_skips_a_step_that_overflowed(device: torch.device) -> None:
    model, (x, target) = _soft_resnet18(), _images(4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    with torch.autocast(device.type, torch.float16):
        loss = nn.functional.cross_entropy(model(x), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("name", ["torchvision basic", "torchvision bottleneck", "timm d", "timm se", "timm silu"])
def test_converted_models_equal_the_originals(name: str, on_device: torch.device) -> None:
    from tests import test_convert as converting  # needs the oracles: without them this test alone is skipped

    converted, stock = converting.both(converting.VARIANTS[name][0])
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    table = fr.nn.explain(converted)
    assert table.fused == converting.VARIANTS[name][1], str(table)
    assert testing.count_batch_norms(lambda: copy.deepcopy(converted)(x)).fused
    converting.assert_equal_runs(converted, stock, x)
