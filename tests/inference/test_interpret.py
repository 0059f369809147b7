"""The interpreter beside the graphs of the other tests: dtypes, devices, refusals, and what surrounds CUDA graphs."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.cuda import CudaRunner, is_recordable
from fused_resnet.inference.graph import Conv, Graph, Reference, Stock
from fused_resnet.inference.interpret import Interpreter, run
from fused_resnet.inference.operators import decode_constant, name_of, resolve
from fused_resnet.nn.guard import stock
from tests.inference.agreement import error, randomised


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomised(models.cifar.resnet20())


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> Graph:
    return build_graph(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(graph: Graph, model: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    got = run(graph, x, dtype)
    assert isinstance(got, Tensor)
    assert got.dtype == dtype
    with torch.no_grad(), stock():
        expected = model(x.float())
    assert error(got, expected) <= 60 * torch.finfo(dtype).eps + 1e-5  # a rounding for each layer of a path


def test_an_autocast_of_the_caller_changes_nothing(graph: Graph) -> None:
    x = torch.randn(2, 3, 32, 32)
    expected = run(graph, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(graph, x)
    assert isinstance(expected, Tensor)
    assert isinstance(got, Tensor)
    assert torch.equal(got, expected)


def test_the_input_is_not_written(graph: Graph) -> None:
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    run(graph, x)
    assert torch.equal(x, before)


def test_on_the_meta_device(graph: Graph) -> None:
    got = run(graph, torch.empty(5, 3, 40, 32, device="meta"))
    assert isinstance(got, Tensor)
    assert got.shape == (5, 10)


@pytest.mark.parametrize(
    ("x", "error_type", "message"),
    [
        ([1.0], TypeError, r"expected a tensor \(N, 3, H, W\), got list"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, r"floating-point images, got torch.uint8"),
        (torch.zeros(3, 8, 8), ValueError, r"expected images of shape \(N, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), ValueError, r"expected images of shape \(N, 3, H, W\), got \(2, 4, 8, 8\)"),
    ],
)
def test_refusals(graph: Graph, x: Any, error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        run(graph, x) if isinstance(x, Tensor) else Interpreter(graph)(x)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "aten.cat",
        "aten.cat.default.__call__",
        "aten.__class__.default",
        "aten.cat.__class__",
        "aten.no_such_operator.default",
        "torch.load",
        "operator.attrgetter",
        "builtins.eval",
        "prims.add.default",
        "aten.cat.default\n",
        "",
    ],
)
def test_only_operators_are_resolved(name: str) -> None:
    with pytest.raises(ValueError, match="stock step: expected an operator of PyTorch"):
        resolve(name)


def test_names_and_operators() -> None:
    for operator in (torch.ops.aten.cat.default, torch.ops.aten.add.Tensor, torch.sym_max):
        name = name_of(operator)
        assert name is not None
        assert resolve(name) is operator
    assert name_of(print) is None
    assert decode_constant("torch.float16", torch.device("cpu")) is torch.float16
    assert decode_constant("torch.device", torch.device("meta")) == torch.device("meta")
    assert decode_constant("reflect", torch.device("cpu")) == "reflect"
    with pytest.raises(ValueError, match=r"expected a dtype, layout or memory format of torch, got 'torch.load'"):
        decode_constant("torch.load", torch.device("cpu"))


def test_a_dtype_of_the_graph_is_the_one_it_runs_in() -> None:
    steps = (
        Stock("", (), 1, target="aten.ones.default", args=((2,),), kwargs={"dtype": "torch.float32"}),
        Stock("", (1,), 2, target="aten.add.Tensor", args=(Reference(1), Reference("t"))),
    )
    graph = Graph(steps, 0, (2,), None, {"t": torch.ones(2)}, 1)
    for dtype in (torch.float64, torch.bfloat16):
        got = run(graph, torch.zeros(1, 1, 1, 1), dtype)
        assert isinstance(got, Tensor)
        assert got.dtype == dtype


def test_fused_convolutions_of_cudnn(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that a GPU would get, with cuDNN's meaning."""
    calls: list[str] = []

    def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        calls.append("relu")
        return torch.conv2d(x, weight, bias, *geometry).relu()

    def convolution_add_relu(
        x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        calls.append("add_relu")
        return (torch.conv2d(x, weight, bias, *geometry) + alpha * z).relu()

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = run(graph, x, torch.float64)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    monkeypatch.setattr(Interpreter, "_has_fused_conv", lambda _, step: step.act.kind == "relu")
    got = run(graph, x, torch.float64)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert error(got, expected) <= 1e-12
    assert (calls.count("relu"), calls.count("add_relu")) == (10, 9)
    assert sum(isinstance(step, Conv) for step in graph.steps) == 19


class CpuRecording:
    """What a CUDA graph does: it reads and writes memory of its own."""

    def __init__(self, interpreter: Interpreter, shape: tuple[int, ...]) -> None:
        self.interpreter = interpreter
        self.input = interpreter.placed_input(torch.zeros(shape))
        self.outputs = interpreter.compute(self.input)

    def replay(self) -> None:
        for output, value in zip(self.outputs, self.interpreter.compute(self.input), strict=True):
            output.copy_(value)


class CpuRecorder:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.inside = 0

    def record(self, interpreter: Interpreter, shape: tuple[int, ...]) -> CpuRecording:
        self.shapes.append(shape)
        return CpuRecording(interpreter, shape)

    def begin(self) -> None:
        assert self.inside == 0, "two calls at a time"
        self.inside += 1

    def end(self) -> None:
        self.inside -= 1


def test_recordings_are_kept_for_the_last_shapes(graph: Graph) -> None:
    recorder = CpuRecorder()
    runner = CudaRunner(graph, torch.float32, "cpu", shapes=2, recorder=recorder)
    batches = [torch.randn(n, 3, 32, 32) for n in (1, 2, 1, 3, 1, 2)]
    results = [runner(x) for x in batches]
    assert [shape[0] for shape in recorder.shapes] == [1, 2, 3, 2]
    for x, got in zip(batches, results, strict=True):
        expected = run(graph, x)
        assert isinstance(got, Tensor)
        assert isinstance(expected, Tensor)
        assert torch.equal(got, expected)


def test_threads_take_turns(graph: Graph) -> None:
    runner = CudaRunner(graph, torch.float32, "cpu", recorder=CpuRecorder())
    batches = [torch.randn(1, 3, 16, 16) for _ in range(6)]
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: results.__setitem__(i, runner(x))) for i, x in enumerate(batches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(batches):
        assert torch.equal(results[i], run(graph, x))


def test_what_reads_back_is_not_recorded() -> None:
    step = Stock("", (0,), 1, target="aten.nonzero.default", args=(Reference(0),))
    graph = Graph((step,), 0, (1,), None, {}, 1)
    assert not is_recordable(graph)
    recorder = CpuRecorder()
    got = CudaRunner(graph, torch.float32, "cpu", recorder=recorder)(torch.eye(2).view(1, 1, 2, 2))
    assert isinstance(got, Tensor)
    assert got.shape == (2, 4)
    assert not recorder.shapes
