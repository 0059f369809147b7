"""Extents: vector, mask-byte and chunk tails under every instruction set, huge, empty and other-rank tensors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from tests.ops.cases import DTYPES, LAYOUTS, OPS, Case, Operands, check, compare, make, reference, run

# Around the vector widths, the bytes of a mask, and the powers of two at which loops are cut into chunks.
EXTENTS = (*range(1, 36), 63, 64, 65, 127, 129, 255, 256, 257, 511, 513, 1023, 1025, 2047, 2049, 4097)
LARGE_CHANNELS = [0, 1, 31, 62, 63]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails(isa: str, dtype: torch.dtype) -> None:
    acts = ("relu", "silu", "leaky_relu", "identity", "prelu", "tanh", "sigmoid")
    for i, extent in enumerate(EXTENTS):
        act = acts[i % len(acts)]
        op = ("plain", "residual", "dual")[i % 3]
        check(Case(op, (2, 2, 1, extent), dtype, "NCHW", act))  # the contiguous axis of NCHW
        check(Case(op, (3, extent, 2, 1), dtype, "NHWC", act))  # the contiguous axis of NHWC
        check(Case(op, (extent, 5, 1, 1 if extent > 1 else 2), dtype, "NHWC", act))  # its rows
        if extent < 512:
            check(Case("max_pool", (1, 3, 4, extent), dtype, LAYOUTS[i % 2], act))
            check(Case("max_pool", (1, extent, 3, 2), dtype, "NHWC", act))


@pytest.mark.parametrize("op", OPS)
def test_every_activation_under_every_instruction_set(isa: str, op: str) -> None:
    for dtype in DTYPES:
        for i, act in enumerate(testing.ACTIVATIONS):
            for layout in LAYOUTS:
                check(Case(op, (2, 19, 7, 5), dtype, layout, act, "eval" if i % 2 else "train"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("fused_or_double")
def test_many_values_per_channel(dtype: torch.dtype, layout: str) -> None:
    for op, shape in (("plain", (3, 5, 111, 97)), ("residual", (9, 72, 13, 11)), ("max_pool", (2, 24, 57, 43))):
        check(Case(op, shape, dtype, layout))


def _channels(operands: Operands, full: dict[str, Tensor]) -> tuple[Operands, dict[str, Tensor]]:
    """The same problem on a few channels only: channels do not touch each other."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[:, LARGE_CHANNELS] if tensor.dim() == 4 else tensor[LARGE_CHANNELS]

    norm = operands.norm
    names = ("running_mean", "running_var", "weight", "bias")
    small = replace(
        operands,
        x=pick(operands.x),
        residual=pick(operands.residual),
        grad_output=pick(operands.grad_output),
        norm=replace(norm, **{name: pick(getattr(norm, name)) for name in names}),
    )
    picked = {key: value for key, tensor in full.items() if (value := pick(tensor)) is not None}
    return small, picked


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "dtype"), [("residual", torch.float32), ("max_pool", torch.bfloat16)], ids=str)
@pytest.mark.usefixtures("fused_or_double")
def test_larger_than_the_cache(op: str, dtype: torch.dtype, layout: str) -> None:
    # silu has no kink, so the operands need no nudging, which would cost an fp64 pass over all channels.
    operands = make(Case(op, (16, 64, 112, 112), dtype, layout, "silu"))
    small, got = _channels(operands, run(operands))
    compare(small, got, reference(small))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3)])
def test_empty_batch_keeps_statistics_and_gives_zero_gradients(shape: tuple[int, ...], layout: str) -> None:
    for op in ("plain", "residual", "dual"):
        for act in testing.ACTIVATIONS:
            for mode in ("train", "eval"):
                operands = make(Case(op, shape, torch.float32, layout, act, mode))
                got = run(operands)
                assert got["y"].shape == shape
                for key, value in got.items():
                    if key.endswith(("running_mean", "running_var")):
                        norm = operands.residual_norm if key.startswith("residual_") else operands.norm
                        assert torch.equal(value, getattr(norm, key.removeprefix("residual_"))), (op, act, key)
                    elif key.startswith("grad_"):
                        assert not value.any(), (op, act, mode, key, value)


def test_empty_batch_through_the_stem_and_add_act() -> None:
    stats = torch.zeros(4), torch.ones(4)
    for training in (True, False):
        x = torch.empty(0, 4, 8, 8, requires_grad=True)
        y = fr.ops.batch_norm_act_max_pool(x, *stats, training=training)
        assert y.shape == (0, 4, 4, 4)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    assert torch.equal(stats[0], torch.zeros(4))
    assert torch.equal(stats[1], torch.ones(4))
    assert fr.ops.add_act(torch.empty(0, 4, 8, 8), torch.empty(0, 4, 8, 8)).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_other_ranks_are_the_same_numbers(training: bool) -> None:
    for shape in ((12, 6), (4, 6, 5), (2, 6, 3, 2, 4)):
        x, r, dy = torch.randn(shape), torch.randn(shape), torch.randn(shape)
        results = []
        for extents in (shape, (shape[0], shape[1], max(x.numel() // (shape[0] * shape[1]), 1), 1)):
            mean, var = torch.zeros(6), torch.ones(6)
            leaf, residual = x.view(extents).clone().requires_grad_(), r.view(extents).clone().requires_grad_()
            y = fr.ops.batch_norm_act(leaf, mean, var, residual=residual, training=training, act="silu")
            assert y.shape == extents
            y.backward(dy.view(extents))
            assert leaf.grad is not None
            assert residual.grad is not None
            results.append([t.reshape(-1) for t in (y.detach(), leaf.grad, residual.grad, mean, var)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
