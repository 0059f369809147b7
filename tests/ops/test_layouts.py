"""Inputs, residuals and gradients that are permuted, sliced, expanded or misaligned: same numbers, nothing written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.ops.cases import LAYOUTS, OPS, Case, check, make, run


def _other_layout(t: Tensor) -> Tensor:
    last = t.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def _channel_major(t: Tensor) -> Tensor:
    return t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)


def _transposed_image(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def _channel_slice(t: Tensor) -> Tensor:
    big = t.new_full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), 7.0)
    if t.is_contiguous(memory_format=torch.channels_last):
        big = big.contiguous(memory_format=torch.channels_last)
    big[:, 2:-1] = t
    return big[:, 2:-1]


def _every_second_column(t: Tensor) -> Tensor:
    big = t.new_full((*t.shape[:3], 2 * t.shape[3]), 7.0)
    big[..., ::2] = t
    return big[..., ::2]


def _misaligned(t: Tensor) -> Tensor:
    flat = t.new_empty(t.numel() + 1)
    view = torch.as_strided(flat, t.shape, t.stride(), 1)
    return view.copy_(t)


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "other_layout": _other_layout,
    "channel_major": _channel_major,
    "transposed_image": _transposed_image,
    "channel_slice": _channel_slice,
    "every_second_column": _every_second_column,
    "misaligned": _misaligned,
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("op", OPS)
def test_strides(op: str, arrangement: str) -> None:
    function = ARRANGEMENTS[arrangement]
    dtypes = (torch.float32, torch.bfloat16) if fr.is_available() else (torch.float32,)
    for dtype in dtypes:
        for layout in LAYOUTS:
            for which in (("x",), ("residual",), ("grad_output",), ("x", "residual", "grad_output")):
                if "residual" in which[:1] and op not in ("residual", "dual"):
                    continue

                def arrange(name: str, tensor: Tensor, which: tuple[str, ...] = which) -> Tensor:
                    return function(tensor) if name in which else tensor.clone()

                check(Case(op, (3, 11, 6, 9), dtype, layout, "leaky_relu"), arrange=arrange)


@pytest.mark.parametrize("op", OPS)
def test_expanded_operands_and_gradients_are_read_and_not_written(op: str) -> None:
    for layout in LAYOUTS:
        operands = make(Case(op, (4, 6, 5, 7), torch.float32, layout, "silu"))
        operands.x = operands.x[:1, :, :, :1].clone()
        operands.grad_output = operands.grad_output[:1, :1, :1, :1].clone()
        shape = {"max_pool": (4, 6, 3, 4), "conv": (4, 5, 5, 7)}.get(op, (4, 6, 5, 7))
        wide: dict[str, Tensor] = {}

        def expand(name: str, tensor: Tensor, shape: tuple[int, ...] = shape, seen: dict[str, Tensor] = wide) -> Tensor:
            seen[name] = tensor.clone()
            if name == "residual":
                return tensor[:1, :, :1].expand(4, 6, 5, 7)
            return seen[name].expand((4, 6, 5, 7) if name == "x" else shape)

        def dense(name: str, tensor: Tensor) -> Tensor:
            last = torch.channels_last if layout == "NHWC" else torch.contiguous_format  # noqa: B023
            return expand(name, tensor).contiguous(memory_format=last)

        expanded, reference = run(operands, arrange=expand), run(operands, arrange=dense)
        for name in ("x", "grad_output"):
            assert torch.equal(wide[name], getattr(operands, name)), f"{op} wrote into {name}"
        for key, value in reference.items():
            torch.testing.assert_close(expanded[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_sum(op: str) -> None:
    """``y.sum().backward()`` hands over a gradient of stride 0."""
    for layout in LAYOUTS:
        operands = make(Case(op, (3, 5, 6, 4), torch.float32, layout, "relu"))
        operands.grad_output = torch.ones_like(operands.grad_output)

        def of_sum(name: str, tensor: Tensor) -> Tensor:
            return torch.ones(()).expand(tensor.shape) if name == "grad_output" else tensor.clone()

        got, expected = run(operands, arrange=of_sum), run(operands)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_no_operand_is_written(op: str) -> None:
    for layout in LAYOUTS:
        for mode in ("train", "eval"):
            operands = make(Case(op, (2, 6, 5, 7), torch.float32, layout, "prelu", mode))
            tensors: dict[str, Tensor] = {}

            def remember(name: str, tensor: Tensor, tensors: dict[str, Tensor] = tensors) -> Tensor:
                tensors[name] = tensor.clone()
                return tensors[name]

            run(operands, arrange=remember)
            for name, tensor in tensors.items():
                assert torch.equal(tensor, getattr(operands, name)), f"{op} wrote into {name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_keep_the_layout(layout: str) -> None:
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    for op in OPS:
        got = run(make(Case(op, (2, 6, 8, 10), torch.float32, layout)))
        for key in ("y", "grad_x", "grad_residual"):
            if key in got:
                assert got[key].is_contiguous(memory_format=memory_format), (op, key, got[key].stride())
