"""A plan computes what its graph says: against the interpreter in float64, for any graph, shape, block and thread."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_resnet import testing
from fused_resnet.inference import graph as g
from fused_resnet.inference import plan as planning
from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.interpret import Interpreter
from fused_resnet.inference.plan import Plan
from fused_resnet.inference.weights import Weights
from tests.inference.networks import NETWORKS, assert_near, error, flat, images, network, same

pytestmark = pytest.mark.usefixtures("needs_extension")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request: pytest.FixtureRequest) -> g.Graph:
    torch.manual_seed(3)
    return build_graph(network(request.param), images(2, 3, 32, 32))


def planned(graph: g.Graph, x: Tensor, dtype: torch.dtype, *, winograd: bool = True) -> Plan:
    return Plan(graph, tuple(x.shape), Weights(graph, dtype), numerics=(winograd, 3, False))


def interpreted(graph: g.Graph, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    interpreter = Interpreter(graph, dtype)
    return interpreter.compute(interpreter.placed_input(x))


def check(graph: g.Graph, x: Tensor, dtype: torch.dtype) -> Plan:
    plan = planned(graph, x, dtype)
    got = plan(x.to(dtype))
    assert all(y.dtype is dtype for y in got)
    assert_near(got, interpreted(graph, x, torch.float64), interpreted(graph, x, dtype), dtype)
    return plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 40), (7, 17, 19)], ids=str)
def test_shapes(graph: g.Graph, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(graph, images(shape[0], 3, *shape[1:], dtype=torch.bfloat16), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, 6])
def test_blocks_of_images(graph: g.Graph, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(batch, 3, 32, 28, dtype=torch.bfloat16)
    whole = planned(graph, x, dtype)
    monkeypatch.setattr(planning, "_CACHE_BYTES", 4000 * dtype.itemsize)
    plan = check(graph, x, dtype)
    counts = {part.blocks for part in plan._parts if isinstance(part, planning._Run)}
    assert batch in counts
    assert plan.arena_bytes() <= whole.arena_bytes()
    assert {part.blocks for part in whole._parts if isinstance(part, planning._Run)} == {1}


def test_runs_of_different_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build_graph(network("cifar, shortcut B"))
    monkeypatch.setattr(planning, "_CACHE_BYTES", 600 << 10)
    plan = check(graph, images(8, 3, 32, 32), torch.float32)
    counts = [part.blocks for part in plan._parts if isinstance(part, planning._Run)]
    assert len(counts) > 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("cache", [1 << 30, 100 << 10])
def test_any_number_of_threads_gives_the_same_bits(graph: g.Graph, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_CACHE_BYTES", cache)
    x = images(4, 3, 40, 36)
    plan = planned(graph, x, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(plan(x))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_plan_is_only_read(graph: g.Graph) -> None:
    x, other = images(2, 3, 24, 24), images(2, 3, 24, 24, seed=2)
    plan = planned(graph, x, torch.float32)
    first = plan(x)
    kept = [y.clone() for y in first]
    before = x.clone()
    assert not same(plan(other), kept)
    assert same(first, kept)
    assert same(plan(x), kept)
    assert torch.equal(x, before)


def test_instruction_sets(isa: str) -> None:
    graph = build_graph(network("residual"), images(2, 3, 32, 32))
    x = images(3, 3, 29, 34, dtype=torch.bfloat16)
    for dtype in (*DTYPES, torch.float16):
        plan = check(graph, x, dtype)
        # A narrow dtype or a wide level may have no kernel of its own; it is never a wider one that runs.
        levels = testing.isa_levels()
        for line in plan.lines:
            kernel = plan.native.kernel(line.native)
            assert not any(f"_{wider} " in f"{kernel} " for wider in levels[levels.index(isa) + 1 :])


def test_winograd_is_taken_unless_refused() -> None:
    graph = build_graph(network("residual"), images(2, 3, 32, 32))
    x = images(2, 3, 64, 64)
    kernels = [
        " ".join(plan.native.kernel(line.native) for line in plan.lines)
        for plan in (planned(graph, x, torch.float32, winograd=allowed) for allowed in (True, False))
    ]
    assert "winograd" in kernels[0]
    assert "winograd" not in kernels[1]


def test_every_step_of_a_residual_network_is_ours() -> None:
    plan = planned(build_graph(network("residual"), images(2, 3, 32, 32)), images(2, 3, 32, 32), torch.float32)
    assert all(line.native is not None for line in plan.lines)
    assert [type(line.step).__name__ for line in plan.lines].count("Conv") == 7


def test_a_product_between_our_steps_is_pytorchs() -> None:
    graph = build_graph(network("gated"), images(2, 3, 32, 32))
    lines = planned(graph, images(2, 3, 16, 16), torch.float32).lines
    stock = [line.step.target for line in lines if isinstance(line.step, g.Stock)]
    assert stock == [line.step.target for line in lines if line.native is None] == ["aten.mul.Tensor"]


# Random graphs: every value has the shape of the images, so that any step may read any of them.

CHANNELS = 5
ACTS = st.sampled_from(("identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu"))


@st.composite
def graphs(draw: Callable[[st.SearchStrategy], object]) -> g.Graph:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensors: dict[str, Tensor] = {}

    def tensor(*shape: int) -> str:
        name = f"t{len(tensors)}"
        scale = 1 / (4 * shape[1] * shape[2] * shape[3]) ** 0.5 if len(shape) == 4 else 1
        tensors[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return name

    def act() -> g.Activation:
        kind = draw(ACTS)
        return g.Activation(kind, 0.125, tensor(draw(st.sampled_from((1, CHANNELS)))) if kind == "prelu" else None)

    steps: list[g.Step] = []
    for output in range(1, draw(st.integers(1, 10)) + 1):
        near = st.integers(max(0, output - 4), output - 1)
        a, b = draw(near), draw(near)
        kind = draw(st.sampled_from(("conv", "conv", "conv", "add", "act", "affine", "max", "mean", "stock", "same")))
        if kind == "conv":
            taps = draw(st.sampled_from((1, 3)))
            pre = draw(st.booleans())
            step: g.Step = g.Conv(
                "conv",
                (a, b) if draw(st.booleans()) else (a,),
                output,
                tensor(CHANNELS, CHANNELS, taps, taps),
                tensor(CHANNELS) if draw(st.booleans()) else None,
                padding=(taps // 2, taps // 2),
                act=act(),
                scale=tensor(CHANNELS) if pre else None,
                shift=tensor(CHANNELS) if pre else None,
                pre=act() if pre else g.IDENTITY,
            )
        elif kind == "add":
            step = g.Add("add", (a, b), output, act())
        elif kind == "act":
            step = g.Act("act", (a,), output, act())
        elif kind == "affine":
            inputs = (a, b) if draw(st.booleans()) else (a,)
            step = g.Affine("affine", inputs, output, tensor(CHANNELS), tensor(CHANNELS), act())
        elif kind == "max":
            step = g.MaxPool("max", (a,), output, (3, 3), (1, 1), (1, 1))
        elif kind == "mean":
            step = g.AvgPool("mean", (a,), output, (3, 3), (1, 1), (1, 1), count_include_pad=draw(st.booleans()))
        elif kind == "stock":
            args = (g.Reference(a), g.Reference(b))
            step = g.Stock("stock", tuple(dict.fromkeys((a, b))), output, "aten.maximum.default", args)
        else:  # a view of what it reads
            step = g.Stock("same", (a,), output, "aten.alias.default", (g.Reference(a),))
        steps.append(step)
    read = {value for step in steps for value in step.inputs}
    outputs = [step.output for step in steps if step.output not in read]
    outputs += draw(st.lists(st.integers(0, len(steps)), max_size=1))
    return g.Graph(tuple(steps), 0, tuple(outputs), "tuple", tensors, CHANNELS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(graphs(), st.sampled_from((1, 2, 4)), st.sampled_from((1 << 30, 5000, 1)))
def test_any_graph(graph: g.Graph, batch: int, cache: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_CACHE_BYTES", cache)
        x = images(batch, CHANNELS, 6, 7, dtype=torch.float64)
        got = planned(graph, x, torch.float64)(x)
    for ours, reference in zip(got, interpreted(graph, x, torch.float64), strict=True):
        assert error(ours, reference) <= len(graph.steps) * testing.accumulation_tolerance(torch.float64, 45)


# Single steps with what networks seldom have.


def one_step(step: g.Step, *tensors: tuple[str, Tensor], channels: int = CHANNELS) -> g.Graph:
    return g.Graph((step,), 0, (1,), None, dict(tensors), channels)


@pytest.mark.parametrize(
    "step",
    [
        g.MaxPool("", (0,), 1, (3, 2), (2, 1), (1, 0), (2, 3)),
        g.MaxPool("", (0,), 1, (3, 3), (2, 2), (1, 1), ceil_mode=True),
        g.AvgPool("", (0,), 1, (3, 2), (2, 2), (1, 1), ceil_mode=True),
        g.AvgPool("", (0,), 1, (3, 3), (2, 2), (1, 1), ceil_mode=True, count_include_pad=False),
        g.AvgPool("", (0,), 1, (2, 4), (2, 4)),
        g.GlobalAvgPool("", (0,), 1),
        g.Flatten("", (0,), 1),
        g.Act("", (0,), 1, g.Activation("leaky_relu", -0.5)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_steps_without_weights(step: g.Step, dtype: torch.dtype) -> None:
    check(one_step(step), images(3, CHANNELS, 9, 10, dtype=torch.bfloat16), dtype)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 9, (3, 5), (2, 1), (1, 2), (1, 2)),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Conv2d(6, 4, 3, dilation=9, padding=9),
        nn.Conv2d(6, 4, 18, padding=9),
    ],
    ids=repr,
)
def test_convolutions_with_and_without_a_kernel(module: nn.Conv2d) -> None:
    step = g.Conv(
        "conv", (0,), 1, "w", "b", module.stride, module.padding, module.dilation, module.groups, g.Activation("silu")
    )
    graph = one_step(step, ("w", module.weight.detach()), ("b", module.bias.detach()), channels=6)
    check(graph, images(2, 6, 12, 11), torch.float32)


def test_a_flatten_of_many_pixels_keeps_torchs_order() -> None:
    torch.manual_seed(5)
    weight, matrix = ("w", torch.randn(4, 3, 3, 3)), ("m", torch.randn(7, 4 * 6 * 5))
    steps = (g.Conv("", (0,), 1, "w"), g.Flatten("", (1,), 2), g.Linear("", (2,), 3, "m"))
    check(g.Graph(steps, 0, (3, 2), "tuple", dict([weight, matrix]), 3), images(3, 3, 8, 7), torch.float32)


def chain(*inputs: tuple[int, ...]) -> g.Graph:
    """Convolutions of these values, between two activations."""
    weights = {f"w{i}": torch.randn(CHANNELS, CHANNELS, 3, 3) / 8 for i in range(len(inputs))}
    steps: list[g.Step] = [g.Act("", (0,), 1, g.Activation("tanh"))]
    for i, values in enumerate(inputs):
        steps.append(g.Conv("", values, i + 2, f"w{i}", padding=(1, 1)))
    last = len(steps)
    steps.append(g.Act("", (last,), last + 1, g.Activation("tanh")))
    return g.Graph(tuple(steps), 0, (last + 1,), None, weights, CHANNELS)


@pytest.mark.parametrize("cache", [1 << 30, 1])
@pytest.mark.parametrize(
    "inputs",
    [
        ((1, 1),),  # its operand is its residual too
        ((1,), (2, 1), (3, 1)),  # the residual is read again
        ((1,), (1, 2), (2, 3)),
        ((1,), (2, 1), (3, 2)),  # and here it is not
    ],
    ids=str,
)
def test_a_convolution_writes_over_its_residual_only_if_nobody_reads_it_again(
    inputs: tuple[tuple[int, ...], ...], cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(6)
    monkeypatch.setattr(planning, "_CACHE_BYTES", cache)
    # Several units of work an image, so that one reads what another writes.
    check(chain(*inputs), images(2, CHANNELS, 40, 41), torch.float32)


def test_outputs_may_be_the_images_and_the_same_value_twice() -> None:
    graph = g.Graph((g.Act("", (0,), 1, g.Activation("relu")),), 0, (1, 0, 1), "list", {}, CHANNELS)
    x = images(2, CHANNELS, 4, 4)
    first, second, third = planned(graph, x, torch.float32)(x)
    assert torch.equal(second, x)
    assert torch.equal(first, x.relu())
    assert torch.equal(third, first)


def test_nan_and_infinities_stay_in_their_image(graph: g.Graph) -> None:
    x = images(4, 3, 32, 32)
    clean = flat(planned(graph, x, torch.float32)(x))
    x[1, 0, 5, 6], x[3, 2, 17, 3] = torch.nan, torch.inf
    got = planned(graph, x, torch.float32)(x)
    for ours, theirs, before in zip(got, interpreted(graph, x, torch.float32), clean, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert ours[1].isnan().any()
        # A neighbour's NaN may cost its tiles Winograd's algorithm, so the other images may be rounded otherwise.
        assert error(ours[[0, 2]], before[[0, 2]]) <= 4 * testing.accumulation_tolerance(torch.float32, 576)
