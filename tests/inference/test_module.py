"""`optimize_for_inference`: the module behaves as the model did, in eval mode, for every image and every caller."""

import copy
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.inference import InferenceModule, optimize_for_inference
from fused_resnet.inference import module as modules
from tests.inference.networks import Pyramid, Residual, assert_near, conv_bn, error, flat, images, network, same

EXTENTS = [(1, 32, 32), (2, 33, 40), (5, 17, 19), (3, 64, 32)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(11)
    return network("residual")


@pytest.fixture(scope="module")
def pyramid() -> nn.Module:
    torch.manual_seed(12)
    return network("pyramid")


def optimised(model: nn.Module, dtype: torch.dtype | None = None) -> InferenceModule:
    return optimize_for_inference(model, dtype=dtype, example_input=images(2, 3, 32, 32))


@pytest.fixture(scope="module")
def module(model: nn.Module) -> InferenceModule:
    return optimised(model)


@pytest.fixture(scope="module")
def pyramid_module(pyramid: nn.Module) -> InferenceModule:
    return optimised(pyramid)


def fresh(module: InferenceModule) -> InferenceModule:
    """Without plans."""
    return InferenceModule(module.graph)


def check(module: InferenceModule, model: nn.Module, x: Tensor) -> None:
    """Against the model in float64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        own = copy.deepcopy(model).to(module.dtype)(x.to(module.dtype))
        assert_near(module(x), exact(x.double()), own, module.dtype)


# Numbers.


@pytest.mark.parametrize("shape", EXTENTS, ids=str)
def test_as_the_model(module: InferenceModule, model: nn.Module, shape: tuple[int, int, int]) -> None:
    check(module, model, images(shape[0], 3, *shape[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    # Folded in float32, the tensors of a float32 model do not become float64's.
    model = copy.deepcopy(model).double() if dtype is torch.float64 else model
    module = optimised(model, dtype)
    x = images(2, 3, 33, 40, dtype=torch.bfloat16)
    check(module, model, x.to(dtype))
    # Converted on the way in and out, as the caller could do.
    assert module(x.float()).dtype is torch.float32
    assert same(module(x.float()), module(x.to(dtype)).float())


def test_half_precision_images_of_a_float_module(module: InferenceModule) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = images(2, 3, 32, 32, dtype=torch.bfloat16)
        got = module(x.to(dtype))
        assert got.dtype is dtype
        assert same(got, module(x.float()).to(dtype))


def test_a_dictionary_of_outputs(pyramid_module: InferenceModule, pyramid: nn.Module) -> None:
    x = images(2, 3, 24, 20)
    got = pyramid_module(x)
    assert list(got) == ["coarse", "fine", "mean"]
    check(pyramid_module, pyramid, x)
    with torch.no_grad():
        expected = pyramid(x)
    assert {name: y.shape for name, y in got.items()} == {name: y.shape for name, y in expected.items()}


def test_timms_squeeze_and_excitation() -> None:
    from tests.oracles import timm

    torch.manual_seed(13)
    blocks = {"block_args": {"attn_layer": "se"}, "channels": (16, 16, 24, 32), "num_classes": 9}
    resnet = timm.models.resnet
    model = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), **blocks).eval()
    module = optimised(model)
    check(module, model, images(2, 3, 64, 48))
    assert "aten.mul.Tensor" in module.explain((2, 3, 64, 48), calls=1)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat((x, x), 3)[..., : x.shape[3]],
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ],
    ids=("nchw", "channels_last", "columns", "channels", "strided", "permuted"),
)
def test_layouts_of_the_images(module: InferenceModule, layout: Callable[[Tensor], Tensor]) -> None:
    x = images(2, 3, 33, 30)
    y = layout(x)
    assert torch.equal(x, y)
    assert same(module(y), module(x))


def test_expanded_images_and_one_channel() -> None:
    torch.manual_seed(14)
    module = optimize_for_inference(Residual(channels=1).eval(), example_input=images(2, 1, 32, 32))
    one = images(1, 1, 32, 32)
    assert same(module(one.expand(4, 1, 32, 32)), module(one.repeat(4, 1, 1, 1)))
    assert same(module(one.contiguous().squeeze(1).unsqueeze(1)), module(one))


def test_no_images_as_eager(
    module: InferenceModule, model: nn.Module, pyramid_module: InferenceModule, pyramid: nn.Module
) -> None:
    x = torch.empty(0, 3, 32, 32)
    with torch.no_grad():
        assert module(x).shape == model(x).shape == (0, 10)
        assert module(x.bfloat16()).dtype is torch.bfloat16
        expected, got = pyramid(x), pyramid_module(x)
    assert {name: y.shape for name, y in got.items()} == {name: y.shape for name, y in expected.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_as_eager(pyramid_module: InferenceModule, pyramid: nn.Module, value: float) -> None:
    x = images(3, 3, 20, 24)
    x[1, 2, 7, 9] = value
    got = pyramid_module(x)
    with torch.no_grad():
        expected = pyramid(x)
    for ours, theirs in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours == torch.inf, theirs == torch.inf)
        assert not ours[1].isfinite().all()
        finite = theirs.isfinite()
        assert error(ours[finite], theirs[finite].double()) <= 8 * testing.accumulation_tolerance(torch.float32, 576)


def test_what_comes_out_can_be_used_for_training(module: InferenceModule) -> None:
    """Features of a frozen network are what a new head is trained on."""
    head = nn.Linear(10, 3)
    head(module(images(2, 3, 32, 32))).sum().backward()
    assert head.weight.grad is not None


def test_results_outlive_the_next_call(pyramid_module: InferenceModule) -> None:
    first = pyramid_module(images(2, 3, 24, 24))
    kept = {name: y.clone() for name, y in first.items()}
    pyramid_module(images(2, 3, 24, 24, seed=2))
    assert same(first, kept)


def test_instruction_sets_and_winograd_are_asked_at_every_call(
    module: InferenceModule, model: nn.Module, isa: str
) -> None:
    module = fresh(module)
    x = images(2, 3, 32, 32)
    check(module, model, x)
    with fr.numerics.winograd(False):
        check(module, model, x)
        assert "winograd" not in module.explain(tuple(x.shape), calls=1)
    with testing.isa_cap("scalar"):
        check(module, model, x)
    assert "winograd" in module.explain(tuple(x.shape), calls=1)


# Callers.


def test_threads_of_torch(module: InferenceModule) -> None:
    x = images(3, 3, 40, 36)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(module(x))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_many_callers_at_once(module: InferenceModule) -> None:
    module, serial = fresh(module), fresh(module)
    batches = [images(1 + i % 3, 3, 24 + 4 * i, 40 - 2 * i, seed=i) for i in range(8)]
    expected = [serial(x) for x in batches]
    wrong: list[int] = []
    start = threading.Barrier(len(batches))

    def call(i: int) -> None:
        start.wait()
        for j in range(4):
            if not same(module(batches[(i + j) % 8]), expected[(i + j) % 8]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.usefixtures("needs_extension")
def test_plans_are_kept_for_the_last_shapes_only(pyramid_module: InferenceModule) -> None:
    module = fresh(pyramid_module)
    shapes = [(1, 3, 8 + i, 9) for i in range(modules._MOST_PLANS + 4)]
    first = [module(images(*shape)) for shape in shapes]
    assert len(module._plans) == modules._MOST_PLANS
    assert [key[0] for key in module._plans] == shapes[4:]
    module(images(*shapes[4]))
    module(images(*shapes[0]))
    assert [key[0] for key in module._plans] == [*shapes[6:], shapes[4], shapes[0]]
    assert same(module(images(*shapes[0])), first[0])


def test_copies_compute_the_same(module: InferenceModule) -> None:
    x = images(2, 3, 32, 32)
    expected = module(x)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other, InferenceModule)
        assert not other.training
        assert same(other(x), expected)


def test_explain_names_every_step_and_what_is_pytorchs() -> None:
    module = optimised(network("gated"))
    text = module.explain((2, 3, 16, 16), calls=1)
    if not fr.is_available():
        assert "PyTorch's operators" in text
        return
    lines = text.splitlines()
    for step in module.graph.steps:
        assert any(line.startswith(f"{step.name} ") or not step.name for line in lines[1:]), step
    assert re.search(r"run by PyTorch's operators: .*aten\.mul\.Tensor", lines[-1])
    assert "2x16x16x16" in text
    assert "Conv + relu" in text


def test_explain_on_another_device(module: InferenceModule) -> None:
    elsewhere = InferenceModule(module.graph, device=torch.device("meta"))
    assert "PyTorch's operators on meta" in elsewhere.explain((1, 3, 32, 32))


@pytest.mark.usefixtures("needs_extension")
def test_explain_speaks_of_the_last_call(module: InferenceModule) -> None:
    module(images(2, 3, 44, 32))
    assert "every step has a kernel of its own" in module.explain(calls=1)
    assert "2x16x22x16" in module.explain(calls=1)
    assert "Add" not in module.explain(calls=1)


# What it is not: a model to train or to move.


def test_there_is_nothing_to_train(module: InferenceModule) -> None:
    assert not module.state_dict()
    assert not list(module.parameters())
    assert not module.training
    assert module.eval() is module
    with pytest.raises(RuntimeError, match=r"InferenceModule\.train: .*optimize_for_inference again"):
        module.train()
    with pytest.raises(RuntimeError, match=r"InferenceModule\.train"):
        nn.ModuleList([module]).train()
    assert not module.training


@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("meta")]
)
def test_it_does_not_change_dtype_or_device(module: InferenceModule, change: Callable[[nn.Module], object]) -> None:
    with pytest.raises(RuntimeError, match=r"optimize_for_inference\(model, dtype=\.\.\.\)"):
        change(module)
    module(images(1, 3, 32, 32))


def test_no_gradient_is_lost_in_silence(module: InferenceModule) -> None:
    x = images(1, 3, 32, 32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"expected images without gradient"):
        module(x)
    with torch.no_grad():
        assert not module(x).requires_grad


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3, TypeError, r"expected a tensor \(N, 3, H, W\), got int"),
        (torch.zeros(3, 32, 32), ValueError, r"expected images of shape \(N, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"expected images of shape \(N, 3, H, W\), got \(1, 4, 32, 32\)"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            ValueError,
            "expected dense floating-point images, got torch.uint8",
        ),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
            ValueError,
            "expected dense floating-point images, got torch.complex64",
        ),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "expected images on cpu, got them on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images(module: InferenceModule, x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"inference: {message}"):
        module(x)


def test_another_extent_or_batch_than_the_captured(module: InferenceModule) -> None:
    for fixed, x, message in (
        ({"extent": (32, 32)}, images(1, 3, 33, 32), r"\(N, 3, 32, 32\), got \(1, 3, 33, 32\)"),
        ({"batch": 2}, images(3, 3, 32, 32), r"\(2, 3, H, W\), got \(3, "),
    ):
        limited = InferenceModule(replace(module.graph, **fixed))
        with pytest.raises(ValueError, match=message):
            limited(x)


# The model it was made from.


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.head.weight.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = optimised(model)
    expected = module(images(2, 3, 32, 32))
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    with torch.no_grad():  # and the module keeps nothing of the model
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert same(module(images(2, 3, 32, 32)), expected)
    assert same(copy.deepcopy(module)(images(2, 3, 32, 32)), expected)


def test_a_model_in_training_mode_is_refused() -> None:
    model = Pyramid()
    with pytest.raises(ValueError, match=r"eval mode, got one in training mode: call model\.eval\(\)"):
        optimised(model)
    model.eval()
    model.left.train()
    with pytest.raises(ValueError, match=r"eval mode, got 'left"):
        optimised(model)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"optimize_for_inference: expected model to be a torch\.nn\.Module, got int"):
        optimize_for_inference(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimize_for_inference: expected dtype .*got torch\.int8"):
        optimize_for_inference(conv_bn(3, 4).eval(), dtype=torch.int8)


SCRIPT = """
import sys, torch
from fused_resnet.inference import InferenceModule
module, x = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save((module(x), module(x[:0]), module.explain(tuple(x.shape))), sys.argv[1])
"""


def test_without_the_extension(
    pyramid_module: InferenceModule, pyramid: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(3, 3, 24, 20)
    path = tmp_path / "module.pt"
    torch.save((pyramid_module, x), path)
    monkeypatch.setenv("FUSED_RESNET_DISABLE", "1")
    subprocess.run([sys.executable, "-c", SCRIPT, path], check=True, timeout=120)
    got, empty, text = torch.load(path)
    with torch.no_grad():
        expected = copy.deepcopy(pyramid).double()(x.double())
    assert list(got) == list(expected)
    with torch.no_grad():
        assert_near(got, expected, pyramid(x), torch.float32)
    assert_near(pyramid_module(x), expected, got, torch.float32)
    assert empty["mean"].shape == (0, expected["mean"].shape[1])
    assert "PyTorch's operators" in text
