"""What went wrong once, or nearly: shapes that are equal only for the example, the caller's modes, shared memory."""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.inference import export
from fused_resnet.inference import graph as g
from fused_resnet.inference.plan import Plan
from fused_resnet.inference.weights import Weights
from tests.inference.networks import images
from tests.oracles import torchvision

CONV = {"stride": 2, "padding": 1}


class Call(nn.Module):
    """A convolution, and what a function makes of it and of the images."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, **options)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.conv, x)


def optimized(function: Callable[[nn.Module, Tensor], object], **options: int) -> tuple[nn.Module, fr.InferenceModule]:
    torch.manual_seed(1)
    model = Call(function, **options).eval()
    return model, fr.optimize_for_inference(model)


def crop(conv: nn.Module, x: Tensor) -> Tensor:
    up = F.interpolate(conv(x), scale_factor=2)
    return up[:, :, : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize(
    "function",
    [
        crop,
        lambda conv, x: conv(x)[:, :, :115, :115],
        lambda conv, x: conv(x[:2]),
        lambda conv, x: torch.relu(F.adaptive_avg_pool2d(conv(x), 3) + F.max_pool2d(conv(x), 37)),
        lambda conv, x: torch.relu(F.max_pool2d(conv(x), 37) + F.adaptive_avg_pool2d(conv(x), 3)),
    ],
    ids=["crop", "slice", "first images", "broadcast", "broadcast into"],
)
@pytest.mark.parametrize("shape", [(2, 3, 224, 224), (3, 3, 101, 99), (1, 3, 240, 260)], ids=str)
def test_shapes_that_are_equal_for_the_example_alone(
    function: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    model, module = optimized(function, **CONV)
    x = images(*shape)
    expected = model(x)
    got = module(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing() -> None:
    _, module = optimized(lambda conv, x: F.hardswish(conv(x)).mean((2, 3)) @ torch.eye(16))
    x = images(1, 3, 18, 18)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_another_default_device_changes_nothing() -> None:
    _, module = optimized(lambda conv, x: F.hardswish(conv(x)))
    x = images(1, 3, 18, 18)
    expected = module(x)
    with torch.device("meta"):
        got = module(x)
    assert got.device.type == "cpu"
    assert torch.equal(got, expected)


def test_random_numbers_and_a_default_device_around_the_capture_stay() -> None:
    model = Call(lambda conv, x: F.hardswish(conv(x))).eval()
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        module = fr.optimize_for_inference(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = images(1, 3, 18, 18)
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_outputs_are_the_callers_own() -> None:
    _, module = optimized(lambda conv, x: (x.clone(), conv(x), conv(x).clone(), conv(x)[:1]))
    x = images(2, 3, 18, 18).contiguous(memory_format=torch.channels_last)
    before, memory = x.clone(), set()
    for y in module(x):
        memory.add(y.untyped_storage().data_ptr())
        y.zero_()
    assert torch.equal(x, before)
    assert len(memory | {x.untyped_storage().data_ptr()}) == 5


def test_negated_views() -> None:
    model, module = optimized(lambda conv, x: conv(x))
    x = torch._neg_view(images(2, 3, 18, 18).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_nobody_reads_any_more_is_freed(needs_extension: None) -> None:
    def chain(conv: nn.Module, x: Tensor) -> Tensor:
        y = conv(x)
        for _ in range(40):
            y = F.hardswish(y)
        return y

    _, module = optimized(chain, padding=1)
    x = images(4, 3, 128, 128)
    module(x)
    peaks: list[int] = []
    live: set[int] = set()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.hardswish.default:
                key = id(result)
                live.add(key)
                weakref.finalize(result, live.discard, key)
                peaks.append(len(live))
            return result

    with Count():
        module(x)
    assert len(peaks) == 40
    assert max(peaks) <= 3


@pytest.mark.parametrize(
    "function",
    [lambda conv, x: conv(x) * conv(x).sum().item(), lambda conv, x: conv(x)[conv(x) > 0]],
    ids=["item", "mask"],
)
def test_shapes_or_numbers_of_the_images_are_refused_at_once(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="build_graph: expected"):
        fr.optimize_for_inference(Call(function).eval())


def test_numbers_that_grow_without_end_are_refused() -> None:
    steps: list[g.Step] = [g.Stock("size", (0,), 1, "aten.sym_size.int", (g.Reference(0), 2))]
    for i in range(1, 30):
        arguments = (g.Reference(i), g.Reference(i))
        steps.append(g.Stock(f"square {i}", (i, i), i + 1, "operator.mul", arguments))
    steps.append(g.Act("act", (0,), 31, g.Activation("relu")))
    module = fr.InferenceModule(g.Graph(tuple(steps), 0, (31,), None, {}, 3))
    with pytest.raises(ValueError, match=r"2\*\*63"):
        module(images(1, 3, 8, 8))


def test_a_sum_of_two_shapes_reads_no_memory_that_nobody_wrote(needs_extension: None) -> None:
    weight = torch.randn(3, 3, 1, 1)
    steps = (
        g.Conv("a", (0,), 1, "w"),
        g.GlobalAvgPool("b", (1,), 2),
        g.Conv("c", (2,), 3, "w"),
        g.Conv("d", (0, 3), 4, "w"),
        g.Add("e", (4, 3), 5),
    )
    graph = g.Graph(steps, 0, (5,), None, {"w": weight}, 3)
    x = images(2, 3, 9, 7)
    a = F.conv2d(x, weight)
    c = F.conv2d(a.mean((2, 3), keepdim=True), weight)
    torch.testing.assert_close(fr.InferenceModule(graph)(x), a + c + c, rtol=1e-4, atol=1e-4)


def test_a_plan_runs_on_the_instruction_set_that_it_was_made_for(needs_extension: None) -> None:
    if len(testing.isa_levels()) < 2:
        pytest.skip("this host has one instruction set")
    graph = g.Graph((g.Conv("a", (0,), 1, "w"),), 0, (1,), None, {"w": torch.randn(40, 3, 1, 1)}, 3)
    plan = Plan(graph, (1, 3, 8, 8), Weights(graph, torch.float32), numerics=(True, 3, False))
    x = images(1, 3, 8, 8)
    plan(x)
    with testing.isa_cap("scalar"), pytest.raises(RuntimeError, match="instruction set"):
        plan(x)


def test_a_move_to_where_it_is_already() -> None:
    _, module = optimized(lambda conv, x: conv(x))
    whole = nn.Sequential(module, nn.ReLU()).to("cpu").float()
    assert whole[0] is module
    with pytest.raises(RuntimeError, match="no change of dtype or device"):
        whole.half()


def batch_decides(conv: nn.Module, x: Tensor) -> Tensor:
    y = conv(x)
    return y if x.shape[0] > 1 else 2 * y


def test_a_batch_of_one_that_is_treated_otherwise() -> None:
    model = Call(batch_decides).eval()
    with pytest.raises(ValueError, match="runs at one batch size only"):
        fr.optimize_for_inference(model)
    for batch in (1, 2):
        x = images(batch, 3, 18, 18)
        module = fr.optimize_for_inference(model, example_input=x)
        assert module.graph.batch == batch
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_random_numbers_of_the_network_are_no_difference() -> None:
    _, module = optimized(lambda conv, x: F.dropout(conv(x), 0.5, training=True))
    assert module.graph.batch is None
    assert module.graph.extent is None


def test_the_trial_changes_nothing_of_the_model() -> None:
    class Counts(nn.Conv2d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    exported, model = (nn.Sequential(Counts(3, 8, 3)).eval() for _ in range(2))
    torch.export.export(exported, (images(2, 3, 18, 18),))
    fr.optimize_for_inference(model)
    assert model[0].calls == exported[0].calls


def inner_autocast(conv: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return conv(x)


def test_a_graph_within_the_graph_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="build_graph: expected"):
        fr.optimize_for_inference(Call(inner_autocast).eval())


def test_a_capture_within_a_capture_does_not_wait_for_itself() -> None:
    def nested(conv: nn.Module, x: Tensor) -> Tensor:
        fr.optimize_for_inference(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())
        return conv(x)

    with suppress(ValueError):  # torch.export may refuse it
        fr.optimize_for_inference(Call(nested).eval())


def test_a_squeeze_that_takes_the_batch_with_it() -> None:
    linear = nn.Linear(16, 5)
    model, module = optimized(lambda conv, x: linear(F.adaptive_avg_pool2d(conv(x), 1).squeeze()))
    for batch in (1, 3):
        x = images(batch, 3, 18, 18)
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_output_that_is_a_weight_is_the_callers_own() -> None:
    position = nn.Parameter(torch.ones(1, 3, 4))
    model, module = optimized(lambda conv, x: (conv(x), position.expand(x.shape[0], -1, -1)))
    x = images(1, 3, 18, 18)
    module(x)[1].zero_()
    assert torch.equal(module(x)[1], model(x)[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda conv, x: conv(x).gt_(0) * 2.5,
        lambda conv, x: conv(x).logical_not_(),
        lambda conv, x: conv(x).ge_(0).mean((2, 3)),
    ],
    ids=["gt_", "logical_not_", "ge_"],
)
def test_a_comparison_in_place_keeps_its_dtype(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, module = optimized(function)
    x = images(2, 3, 18, 18)
    got, expected = module(x), model(x)
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_wrapped_models(around: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(1)
    model = Call(lambda conv, x: conv(x).relu_()).eval()
    x = images(2, 3, 18, 18)
    torch.testing.assert_close(fr.optimize_for_inference(around(model))(x), model(x), rtol=1e-4, atol=1e-5)


def test_autocast_around_the_capture_changes_nothing() -> None:
    torch.manual_seed(1)
    model = Call(lambda conv, x: conv(x).add_(1).gt_(0)).eval()
    expected = fr.optimize_for_inference(model).graph.steps
    with torch.autocast("cpu", torch.bfloat16):
        assert fr.optimize_for_inference(model).graph.steps == expected


def test_two_threads_capture_two_models() -> None:
    torch.manual_seed(1)
    models = [Call(lambda conv, x: F.max_pool2d(conv(x).relu_(), 2)).eval() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        modules = list(pool.map(fr.optimize_for_inference, models))
    x = images(2, 3, 18, 18)
    for model, module in zip(models, modules, strict=True):
        assert module.graph.extent is None
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(16, 2, dropout=0.5), nn.LSTM(16, 4, 2, dropout=0.5)], ids=["attention", "lstm"]
)
def test_a_layer_that_drops_out_by_itself_is_not_in_eval_mode(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    model.layer = layer.train()
    with pytest.raises(ValueError, match="in training mode"):
        fr.optimize_for_inference(model)


def test_a_tracer_is_refused(needs_extension: None) -> None:
    _, module = optimized(lambda conv, x: conv(x))
    with pytest.raises(RuntimeError, match="a tracer follows"):
        make_fx(module)(images(1, 3, 18, 18))


def test_only_torchs_own_guards_are_no_branches() -> None:
    """torchvision stands beside torch, in a folder whose name begins alike."""
    assert export._TORCH.endswith(f"{os.sep}torch{os.sep}")
    assert not os.path.join(os.path.dirname(export._TORCH[:-1]), "torchvision", "x.py").startswith(export._TORCH)


@pytest.mark.slow  # of half a minute where cores are shared
def test_code_of_torchvision_that_looks_at_sizes_is_the_networks() -> None:
    torch.manual_seed(1)
    model = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [7, 7], num_classes=10).eval()
    x = images(2, 3, 32, 32)
    module = fr.optimize_for_inference(model, example_input=x)
    assert module.graph.extent == (32, 32)
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
