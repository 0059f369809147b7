"""The contestants of gpu/models.py: a whole training step of one model, run in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import models
import torch
from torch import Tensor, nn

import fused_resnet as fr
from gpu import common

GRADIENT_SCALE = 1024.0  # keeps fp16 gradients off the denormals
GRAPH_WARMUP = 3

Context = Callable[[], AbstractContextManager[object]]


def build(setting: models.Setting, where: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Model in training mode, images and class numbers, on the device."""
    torch.manual_seed(0)
    model: nn.Module = getattr(fr.models, setting.model)().to(where, memory_format=torch.channels_last).train()
    models.soften(model)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, device=where).to(memory_format=torch.channels_last)
    return model, x, torch.randint(0, 1000, (setting.batch,), device=where)


def context_of(side: str) -> Context:
    """What a contestant's steps run under: all but "fused" are stock PyTorch."""
    return nullcontext if side == "fused" else fr.nn.stock


def step_of(model: nn.Module, x: Tensor, target: Tensor, side: str, dtype: str) -> Callable[[], Tensor]:
    """The training step of "eager", "compile" (of the stock code) or "fused": AMP, and for fp16 GradScaler.

    The optimiser is torch's fused SGD for everyone; with it GradScaler never waits for the GPU: steps can be captured.
    """
    on_gpu = x.device.type == "cuda"
    # So small a rate that the weights stay what was verified.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=on_gpu)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=GRADIENT_SCALE, enabled=dtype == "fp16")
    call = torch.compile(model) if side == "compile" else model
    context = context_of(side)

    def step() -> Tensor:
        with context():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, common.DTYPES[dtype], enabled=dtype != "fp32"):
                loss: Tensor = nn.functional.cross_entropy(call(x), target)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    return step


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """fp32 without the tensor cores' ten bits, and without trying every algorithm out for its one use."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def loss_and_gradient(model: nn.Module, x: Tensor, target: Tensor, side: str, dtype: str) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients as one vector, without an optimiser."""
    model.zero_grad(set_to_none=True)
    with context_of(side)():
        with torch.autocast(x.device.type, common.DTYPES[dtype], enabled=dtype != "fp32"):
            loss: Tensor = nn.functional.cross_entropy(model(x), target)
        (loss * GRADIENT_SCALE).backward()  # type: ignore[no-untyped-call]
    gradient = gradient_of(model) / GRADIENT_SCALE
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradient


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def captured(step: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """The whole step as a CUDA graph: what replays it, and the loss that a replay leaves.

    `pool`, from `torch.cuda.graph_pool_handle`, is shared: graphs are replayed one after another, and none needs what
    another left.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        loss = step()
    return graph.replay, loss
