"""`build_graph`: which models, at which sizes, and that it leaves them alone."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.graph import Conv, Stock
from fused_resnet.inference.interpret import run
from tests import convert_models
from tests.inference.agreement import check, kinds, randomised
from tests.oracles import timm, torchvision

RESNET_50 = {"Conv": 53, "MaxPool": 1, "GlobalAvgPool": 1, "Flatten": 1, "Linear": 1}


def conv_bn(channels: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Calls(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = conv_bn()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x))


@pytest.mark.parametrize("build", [torchvision.models.resnet50, models.resnet50])
def test_resnet50_is_nothing_but_these_steps(build: Callable[[], nn.Module]) -> None:
    graph = build_graph(build().eval())
    assert Counter(kinds(graph)) == RESNET_50
    assert (graph.channels, graph.extent, graph.batch, graph.structure) == (3, None, None, None)
    convs = [step for step in graph.steps if isinstance(step, Conv)]
    assert sum(len(step.inputs) == 2 for step in convs) == 16
    assert sum(step.act.kind == "relu" for step in convs) == 49
    assert convs[0].name == "conv1"
    assert {step.name for step in convs} >= {"layer1.0.conv1", "layer4.2.conv3"}


ONE_BLOCK = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("build", "stock"),
    [
        (torchvision.models.resnet18, {}),
        (lambda: models.ResNet(fr.nn.Bottleneck, list(ONE_BLOCK), groups=4, width_per_group=8), {}),
        (models.plain.plain18, {}),
        (models.preact.preresnet18, {}),
        (models.cifar.resnet20, {"aten.slice.Tensor": 4, "aten.pad.default": 2}),
        (models.cifar.plain20, {}),
        (lambda: timm.create_model("resnet50d", layers=ONE_BLOCK), {}),
        (lambda: timm.create_model("resnetv2_18"), {}),
        (lambda: timm.create_model("seresnet50", layers=ONE_BLOCK), {"aten.mul.Tensor": 4}),
        (lambda: timm.create_model("resnetblur18", layers=ONE_BLOCK), {"aten.pad.default": 4}),
        (lambda: timm.create_model("ecaresnet26t", layers=ONE_BLOCK), None),
        (lambda: timm.create_model("nf_resnet26"), None),
        (lambda: torchvision.models.DenseNet(4, (2, 2), 8), None),
    ],
)
def test_networks(build: Callable[[], nn.Module], stock: dict[str, int] | None) -> None:
    graph = check(randomised(build()), shapes=((2, 64, 64), (1, 49, 70)))
    assert (graph.extent, graph.batch) == (None, None)
    if stock is not None:
        assert Counter(step.target for step in graph.steps if isinstance(step, Stock)) == stock


def test_a_preactivated_network_keeps_one_affine() -> None:
    graph = build_graph(randomised(models.preact.preresnet18()))
    assert Counter(kinds(graph)) == {
        "Conv": 20,
        "MaxPool": 1,
        "Affine": 1,
        "GlobalAvgPool": 1,
        "Flatten": 1,
        "Linear": 1,
    }
    operands = [step for step in graph.steps if isinstance(step, Conv) and step.scale is not None]
    assert operands
    assert all(step.pre.kind == "relu" for step in operands)


@pytest.mark.parametrize("build", [*convert_models.FUSIBLE, *convert_models.HAZARDS])
def test_converted_models(build: type[nn.Module]) -> None:
    model = randomised(build())
    graph = check(fr.convert(model), channels=4, example=torch.zeros(2, 4, 24, 24))
    assert kinds(graph) == kinds(build_graph(model, torch.zeros(2, 4, 24, 24)))


@pytest.mark.parametrize("build", convert_models.HAZARDS_WITHOUT_GRADIENT)
def test_writes_that_others_see(build: type[nn.Module]) -> None:
    model = randomised(build())
    graph = build_graph(model, torch.zeros(2, 4, 24, 24))
    x = torch.randn(2, 4, 24, 24)
    with torch.no_grad():
        expected = model(x.clone())
    got = run(graph, x)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, expected)


class Views(nn.Module):
    """Writes through a view, and to a tensor of which there is a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        half = y[:, :1]
        half.add_(1)
        z = y + x
        rest = F.dropout(z, 0.5, self.training)
        z.mul_(3)
        return y * rest


def test_writes_through_views() -> None:
    check(Views().eval(), example=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("function", "extent", "batch"),
    [
        (lambda x: x.view(x.size(0), 4, -1).mean(2), None, None),
        (lambda x: F.interpolate(x, (x.shape[2] // 2 * 3, x.shape[3] + 1)), None, None),
        (lambda x: x * x.shape[2] if x.shape[2] % 2 else x, (32, 32), None),
        (lambda x: x if x.shape[3] > 20 else -x, (32, 32), None),
        (lambda x: F.linear(x.flatten(1), x.new_ones(1, 4 * 32 * 32)), (32, 32), None),
        (lambda x: x + x.transpose(2, 3), (32, 32), None),
        (lambda x: x + x.new_ones(2, 1, 1, 1), None, 2),
        (lambda x: x if x.shape[0] == 2 else -x, (32, 32), 2),
        (lambda x: sum(x[i].sum() for i in range(x.shape[0])), (32, 32), 2),
    ],
)
def test_sizes(function: Callable[[Tensor], Tensor], extent: tuple[int, int] | None, batch: int | None) -> None:
    model = randomised(Calls(function))
    free = {(None, None): ((1, 8, 64), (3, 33, 40)), (32, None): ((1, 32, 32), (3, 32, 32)), (None, 2): ((2, 40, 33),)}
    shapes = free.get((extent and extent[0], batch), ((2, 32, 32),))
    graph = check(model, shapes=shapes, example=torch.zeros(2, 3, 32, 32))
    assert (graph.extent, graph.batch) == (extent, batch)
    if extent is not None:
        with pytest.raises(ValueError, match=r"expected images of shape .*32, 32.*got \(2, 3, 64, 32\)"):
            run(graph, torch.zeros(2, 3, 64, 32))


def test_a_size_of_one_in_the_example_is_no_constant() -> None:
    assert build_graph(randomised(conv_bn()), torch.zeros(1, 3, 16, 16)).batch is None


def test_a_model_for_one_batch_size_needs_an_example() -> None:
    with pytest.raises(ValueError, match="expected example_input"):
        build_graph(randomised(Calls(lambda x: x + x.new_ones(2, 1, 1, 1))))


class Outputs(nn.Module):
    def __init__(self, structure: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.body, self.structure = conv_bn(), structure

    def forward(self, x: Tensor) -> object:
        y = self.body(x)
        return self.structure(x, y)


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (lambda _, y: y, None),
        (lambda x, y: (y, y * 2, x), "tuple"),
        (lambda _, y: [y], "list"),
        (lambda _, y: {"features": y, "again": y, "a": torch.ones(2)}, ("features", "again", "a")),
    ],
)
def test_outputs(structure: Callable[[Tensor, Tensor], object], expected: object) -> None:
    assert check(randomised(Outputs(structure))).structure == expected


@pytest.mark.parametrize(
    "structure", [lambda _, y: (y, (y,)), lambda _, y: {1: y}, lambda _, y: (y, None), lambda *_: 1]
)
def test_other_outputs_are_refused(structure: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(ValueError, match="build_graph: expected a model that returns"):
        build_graph(randomised(Outputs(structure)))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.body(x)
        return y


def test_what_is_not_a_model_in_eval_mode_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got int"):
        build_graph(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got one in training mode"):
        build_graph(conv_bn())
    model = randomised(nn.Sequential(conv_bn(), conv_bn(4)))
    model[1][1].train()
    with pytest.raises(ValueError, match=r"got '1.1' \(BatchNorm2d\) in training mode"):
        build_graph(model)
    with pytest.raises(ValueError, match="changes nothing in eval mode, got one that changes calls"):
        build_graph(randomised(Counts()))
    with pytest.raises(ValueError, match="meta device"):
        build_graph(conv_bn().eval().to("meta"))
    with pytest.raises(ValueError, match=r"expected example_input to be .* got torch.float32 \(3, 8, 8\)"):
        build_graph(conv_bn().eval(), torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match="example_input"):
        build_graph(conv_bn().eval(), (2, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no Conv2d"):
        build_graph(nn.ReLU().eval())
    with pytest.raises(ValueError, match=r"torch.export can capture, got Calls"):
        build_graph(Calls(lambda x: x if x.sum() > 0 else -x).eval())


def test_a_new_layer_need_not_be_put_into_eval_mode() -> None:
    model = models.cifar.resnet20().eval()
    model.fc = nn.Linear(64, 3)
    assert check(randomised(model)).steps


def test_strides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not depend on strides, got aten.as_strided.default"):
        build_graph(Calls(lambda x: x.as_strided((2, 2), (1, 2))).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_widened_exactly(dtype: torch.dtype) -> None:
    narrow = randomised(Calls(lambda x: F.softmax(x.mean((2, 3)).float(), 1).to(dtype))).to(dtype)
    graph = build_graph(narrow)
    wide = copy.deepcopy(narrow).float()
    wide.function = lambda x: F.softmax(x.mean((2, 3)), 1)
    assert {tensor.dtype for tensor in graph.tensors.values()} == {torch.float32}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(graph, x), wide(x))


def test_the_model_is_left_alone_and_the_graph_too() -> None:
    model = randomised(models.cifar.resnet20())
    calls: list[int] = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {key: (value, value.clone(), value._version) for key, value in model.state_dict(keep_vars=True).items()}
    grads = [parameter.grad for parameter in model.parameters()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    graph = build_graph(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    for key, (value, copied, version) in state.items():
        assert after[key] is value
        assert value._version == version
        assert torch.equal(value, copied)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert len(model.conv1._forward_hooks) == 1
    assert not any(module.training for module in model.modules())

    x = torch.randn(2, 3, 32, 32)
    before = run(graph, x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert isinstance(before, Tensor)
    assert torch.equal(run(graph, x), before)


def test_tensors_are_float32_contiguous_and_all_read() -> None:
    graph = build_graph(randomised(models.cifar.resnet20()).to(memory_format=torch.channels_last))
    assert len(graph.tensors) == 2 * (19 + 1)
    for tensor in graph.tensors.values():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
