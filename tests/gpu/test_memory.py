"""Memory on the GPU: a lower peak than stock, sizes beyond 2^31, no host synchronisation, and running out of it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]

GIB = 1 << 30


def _free_everything() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _needs(gib: int) -> None:
    _free_everything()
    free = torch.cuda.mem_get_info()[0]
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / GIB:.1f} are")


def _step(name: str, batch: int, context: Callable[[], AbstractContextManager[object]]) -> Callable[[], Tensor]:
    model = getattr(fr.models, name)(num_classes=10).to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, 128, 128).to(memory_format=torch.channels_last)
    target = torch.randint(0, 10, (batch,))
    return testing.training_step(model, list(model.parameters()), x, target, bf16=True, context=context)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_peak_of_a_step_is_lower_than_stocks(name: str, cuda: torch.device) -> None:
    _needs(6)
    peaks = {}
    for side, context in (("stock", fr.nn.stock), ("fused", nullcontext)):
        _free_everything()
        before = torch.cuda.memory_allocated()
        step = _step(name, 32, context)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[side] = torch.cuda.max_memory_allocated() - before
        del step
    assert peaks["fused"] < peaks["stock"], f"fused {peaks['fused'] >> 20} MiB, stock {peaks['stock'] >> 20} MiB"


def test_memory_does_not_grow_from_step_to_step(cuda: torch.device) -> None:
    step = _step("resnet18", 8, nullcontext)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_step_never_waits_for_the_gpu(name: str, cuda: torch.device) -> None:
    step = _step(name, 4, nullcontext)
    step()  # initialisation may wait
    with _no_synchronisation():
        step()


def test_inference_never_waits_for_the_gpu(cuda: torch.device) -> None:
    model = fr.models.resnet18(num_classes=10).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        model(x)
        with _no_synchronisation():
            model(x)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_more_than_two_to_the_31_elements(channels_last: bool, cuda: torch.device) -> None:
    """Channels do not touch each other, so the first and the last one, alone, must come out the same."""
    _needs(32)
    shape = (2, 33, 2**15, 1025)  # 2.2e9 elements of two bytes
    x = torch.empty(shape, dtype=torch.bfloat16)
    if channels_last:
        x = x.view(2, 2**15, 1025, 33).permute(0, 3, 1, 2)
    x.normal_().requires_grad_()
    mean, var = torch.zeros(33), torch.ones(33)
    y = fr.ops.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    y.backward(y.detach())
    assert x.grad is not None
    for channel in (0, 32):
        part = x.detach()[:, channel : channel + 1].contiguous().requires_grad_()
        part_mean, part_var = torch.zeros(1), torch.ones(1)
        part_y = fr.ops.batch_norm_act(part, part_mean, part_var, training=True, momentum=1.0)
        part_y.backward(part_y.detach())
        assert part.grad is not None
        torch.testing.assert_close(mean[channel], part_mean[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var[channel], part_var[0], rtol=1e-5, atol=1e-5)
        for got, want in ((y.detach(), part_y.detach()), (x.grad, part.grad)):
            where = got[:, channel : channel + 1]
            assert bool(((where - want).abs() <= 0.02 + 0.02 * want.abs()).all()), channel


def test_the_stem_beyond_two_to_the_31_elements(cuda: torch.device) -> None:
    _needs(24)
    x = torch.zeros((2, 33, 2**15, 1025), dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        x[-1, -1, -1, -1], x[0, 0, 0, 0] = 3.0, 2.0
    y = fr.ops.batch_norm_act_max_pool(x, torch.zeros(33), torch.ones(33), training=False, eps=1e-12)
    assert y[-1, -1, -1, -1] == 3.0
    assert y[0, 0, 0, 0] == 2.0
    assert torch.count_nonzero(y) == 2
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad[-1, -1, -1, -1] == 1.0
    assert x.grad[0, 0, 0, 0] == 1.0


OPERATORS = (
    "batch_norm_act",
    "residual",
    "dual_batch_norm_act",
    "batch_norm_act_max_pool",
    "batch_norm_act_conv",
    "autocast batch_norm_act_conv",  # x is wider than what the convolution computes in
)


def _call(op: str, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    c = x.shape[1]
    first = (x, state["mean"], state["var"], torch.ones(c), torch.zeros(c))
    options: dict[str, Any] = {"training": True}
    if op == "dual_batch_norm_act":
        return fr.ops.dual_batch_norm_act(*first, x, state["mean2"], state["var2"], **options)
    if op == "batch_norm_act_max_pool":
        return fr.ops.batch_norm_act_max_pool(*first, **options)
    if op.endswith("batch_norm_act_conv"):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=op.startswith("autocast")):
            return fr.ops.batch_norm_act_conv(*first, torch.randn(c, c, 1, 1), **options)
    return fr.ops.batch_norm_act(*first, residual=x if op == "residual" else None, **options)


@contextmanager
def _room_for(size: int) -> Iterator[None]:
    """No block of `size` can be allocated, while small ones, of statistics and partial sums, can.

    A limit alone is not enough: segments that something small keeps alive may have large holes. They are filled first.
    """
    _free_everything()
    total, filling = torch.cuda.mem_get_info()[1], []
    try:
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        for part in (size, size // 4, size // 16):
            with suppress(torch.OutOfMemoryError):
                while True:
                    filling.append(torch.empty(part, dtype=torch.uint8))
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size // 2) / total)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("op", OPERATORS)
def test_out_of_memory_leaves_the_statistics_as_they_were(op: str, cuda: torch.device) -> None:
    _needs(2)
    c = 8
    x = torch.randn(16, c, 512, 512, requires_grad=True)  # 128 MiB
    small = torch.randn(2, c, 8, 8, requires_grad=True)
    state = {name: torch.full((c,), 0.5) for name in ("mean", "var", "mean2", "var2")}
    _call(op, small, state).sum().backward()  # libraries that load at the first call have loaded now
    before = {name: value.clone() for name, value in state.items()}
    with _room_for(32 << 20), pytest.raises(torch.OutOfMemoryError):  # of the stem; others write 64 or 128 MiB
        _call(op, x, state)
    for name, value in before.items():
        assert torch.equal(state[name], value), name
    assert bool(_call(op, small, state).isfinite().all())
