"""First and second derivatives by finite differences, and the habits of autograd."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet as fr
from fused_resnet import testing
from tests.ops.cases import LAYOUTS, OPS, Case, Operands, call, make, run

LEAVES = (
    "x",
    "weight",
    "bias",
    "residual",
    "residual_weight",
    "residual_bias",
    "act_weight",
    "conv_weight",
    "conv_bias",
)


def _tensors(operands: Operands, wanted: Any = None) -> dict[str, Tensor | None]:
    """Fresh copies of all operands by name; the ``wanted`` (default: all) leaves require gradients."""
    found: dict[str, Tensor | None] = {}
    for prefix, norm in (("", operands.norm), ("residual_", operands.residual_norm)):
        for key in ("running_mean", "running_var", "weight", "bias"):
            found[prefix + key] = None if norm is None else getattr(norm, key)
    for key in ("x", "residual", "act_weight", "conv_weight", "conv_bias"):
        found[key] = getattr(operands, key)
    return {
        key: None
        if value is None
        else value.detach()
        .clone(memory_format=torch.preserve_format)
        .requires_grad_(key in LEAVES and (wanted is None or key in wanted))
        for key, value in found.items()
    }


def _function(operands: Operands) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a pure function of its leaves: running statistics are copied at each call."""
    tensors = _tensors(operands)
    names = [key for key in LEAVES if tensors[key] is not None]

    def function(*leaves: Tensor) -> Tensor:
        now = {key: None if value is None else value.detach().clone() for key, value in tensors.items()}
        return call(operands, {**now, **dict(zip(names, leaves, strict=True))})

    return function, [leaf for name in names if (leaf := tensors[name]) is not None]


def _far_from_kinks(op: str, act: str, mode: str, layout: str) -> Operands:
    """Finite differences step by 1e-6: keep activation inputs and pooling winners further away than that."""
    operands = make(Case(op, (2, 2, 2, 3), torch.float64, layout, act, mode, mean=0.0))
    if op == "max_pool":  # distinct values, at least 0.1 apart
        order = torch.randperm(operands.x.numel(), generator=torch.Generator().manual_seed(1)).double()
        operands.x = (order.view(operands.x.shape) * 0.13 - 2.0).contiguous(
            memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format
        )
    return operands


MODES = ("train", "eval", "train_no_affine", "eval_weight_only", "no_statistics")


@pytest.mark.parametrize("act", testing.ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, act: str) -> None:
    for i, mode in enumerate(MODES):
        function, leaves = _function(_far_from_kinks(op, act, mode, LAYOUTS[i % 2]))
        assert gradcheck(function, leaves, fast_mode=True), (op, act, mode)
    if op in ("plain", "max_pool"):  # every element of the Jacobian, once
        function, leaves = _function(_far_from_kinks(op, act, "train", "NHWC"))
        assert gradcheck(function, leaves)


@pytest.mark.parametrize("act", testing.ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_gradgradcheck(op: str, act: str) -> None:
    i = testing.ACTIVATIONS.index(act)
    for mode in ("train", MODES[1 + i % (len(MODES) - 1)]):  # over the activations, every mode
        function, leaves = _function(_far_from_kinks(op, act, mode, LAYOUTS[i % 2]))
        assert gradgradcheck(function, leaves, fast_mode=True), (op, act, mode)


@pytest.mark.parametrize("act", testing.ACTIVATIONS)
def test_gradcheck_of_add_act_and_conv2d(act: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, r = (torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    slope = (torch.full((2,), 0.25, dtype=torch.float64).requires_grad_(),) if act == "prelu" else ()

    def add_act(x: Tensor, r: Tensor, *slope: Tensor) -> Tensor:
        return fr.ops.add_act(x, r, act, act_weight=slope[0] if slope else None)

    assert gradcheck(add_act, (x, r, *slope))
    assert gradgradcheck(add_act, (x, r, *slope))
    if act == "identity":
        weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_()
        bias = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
        assert gradcheck(lambda *t: fr.ops.conv2d(*t, padding=1), (x, weight, bias))
        assert gradgradcheck(lambda *t: fr.ops.conv2d(*t, padding=1), (x, weight, bias))


@pytest.mark.parametrize("op", OPS)
def test_every_subset_of_wanted_gradients(op: str) -> None:
    """What is not wanted is not made, and its absence does not change the others."""
    operands = make(Case(op, (3, 5, 4, 6), torch.float32, "NHWC", "prelu"))
    full = run(operands)
    names = [key for key in LEAVES if _tensors(operands)[key] is not None]
    subsets = [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]
    for subset in subsets[:: max(1, len(subsets) // 40)]:
        tensors = _tensors(operands, subset)
        call(operands, tensors).backward(operands.grad_output)
        for name in names:
            tensor = tensors[name]
            assert tensor is not None
            if name not in subset:
                assert tensor.grad is None
                continue
            key = {"conv_weight": "grad_then_0", "conv_bias": "grad_then_1"}.get(name, f"grad_{name}")
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, full[key], rtol=1e-5, atol=1e-5, msg=f"{op} {subset} {name}")
    nothing = call(operands, _tensors(operands, ()))
    assert not nothing.requires_grad


@pytest.mark.parametrize("op", OPS)
def test_retain_graph_gives_the_same_gradients_again(op: str) -> None:
    operands = make(Case(op, (2, 5, 4, 6), torch.float32, "NHWC", "relu"))
    tensors = _tensors(operands)
    leaves = [t for key in LEAVES if (t := tensors[key]) is not None]
    y = call(operands, tensors)
    first = torch.autograd.grad(y, leaves, operands.grad_output, retain_graph=True)
    second = torch.autograd.grad(y, leaves, operands.grad_output)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, operands.grad_output)


@pytest.mark.parametrize("op", OPS)
def test_changing_a_saved_operand_before_backward_is_an_error(op: str) -> None:
    operands = make(Case(op, (2, 5, 4, 6), torch.float32, "NHWC", "silu"))
    for name in ("x", "weight", "conv_weight"):
        tensors = _tensors(operands)
        changed = tensors[name]
        if changed is None:
            continue
        y = call(operands, tensors)
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(operands.grad_output)


@pytest.mark.parametrize("op", OPS)
def test_changing_the_output_is_harmless_or_an_error(op: str) -> None:
    """A caller may apply an in-place operation to y; backward must not silently use the changed values."""
    operands = make(Case(op, (2, 5, 4, 6), torch.float32, "NHWC", "relu"))
    expected = run(operands)
    tensors = _tensors(operands)
    y = call(operands, tensors)
    z = y * 1
    with torch.no_grad():
        y.zero_()
    x = tensors["x"]
    assert x is not None
    try:
        z.backward(operands.grad_output)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert x.grad is not None
        assert torch.equal(x.grad, expected["grad_x"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_statistics_are_updated_without_gradients(op: str, context: Any) -> None:
    operands = make(Case(op, (3, 5, 4, 6), torch.float32, "NHWC", "relu"))
    expected = run(operands, backward=True)
    with context():
        got = run(operands, backward=False)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0, msg=f"{op}: {key}")


def test_backward_of_an_eval_forward_after_a_training_forward() -> None:
    """The running statistics change in between: stock PyTorch's gradient is silently wrong then."""
    for op in OPS:
        operands = make(Case(op, (4, 5, 6, 4), torch.float32, "NHWC", "silu", "eval"))
        expected = run(operands)
        tensors = _tensors(operands)
        y = call(operands, tensors)
        training = replace(operands, norm=replace(operands.norm, training=True))
        if operands.residual_norm is not None:
            training.residual_norm = replace(operands.residual_norm, training=True)
        call(training, tensors)
        x = tensors["x"]
        assert x is not None
        try:
            y.backward(operands.grad_output)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017  (either outcome is right)
        else:
            if not fr.is_available():
                pytest.skip("stock PyTorch's own bug")
            assert x.grad is not None
            torch.testing.assert_close(x.grad, expected["grad_x"], rtol=0, atol=0, msg=op)


def test_two_forwards_then_their_backwards_in_either_order() -> None:
    operands = make(Case("plain", (4, 5, 6, 4), torch.float32, "NHWC", "relu"))
    expected = run(operands)["grad_x"]
    for order in ((0, 1), (1, 0)):
        sets = [_tensors(operands), _tensors(operands)]
        outputs = [call(operands, tensors) for tensors in sets]
        for i in order:
            outputs[i].backward(operands.grad_output)
            x = sets[i]["x"]
            assert x is not None
            assert x.grad is not None
            assert torch.equal(x.grad, expected)


def test_saved_tensor_hooks_see_and_may_move_what_is_saved() -> None:
    operands = make(Case("residual", (2, 5, 4, 6), torch.float32, "NHWC", "relu"))
    expected = run(operands)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = run(operands)
    assert packed
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_checkpointing_recomputes_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    operands = make(Case("plain", (2, 5, 4, 6), torch.float32, "NHWC", "silu"))
    operands.norm = replace(operands.norm, momentum=0.0)  # the second forward must not move the statistics again
    expected = run(operands)["grad_x"]
    tensors = _tensors(operands)
    x = tensors["x"]
    assert x is not None
    y = checkpoint(lambda x: call(operands, {**tensors, "x": x}), x, use_reentrant=False)
    y.backward(operands.grad_output)
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_results_survive_deepcopy() -> None:
    operands = make(Case("plain", (2, 5, 4, 6), torch.float32, "NHWC", "relu"))
    y = run(operands)["y"]
    assert torch.equal(copy.deepcopy(y), y)
