"""What folding may do, and what it must leave alone: every graph against its model, and the steps it has."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.inference.capture import build_graph
from fused_resnet.inference.graph import Act, Activation, Affine, Conv, Graph, Linear
from fused_resnet.inference.interpret import run
from tests.inference.agreement import check, error, kinds, randomised


class Parts(nn.Module):
    """Layers of odd widths, and a forward that is a function of them and the input."""

    def __init__(self, function: Callable[["Parts", Tensor], object]) -> None:
        super().__init__()
        self.conv, self.biased = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=0.1)
        self.plain, self.batch = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)
        self.grouped = nn.Conv2d(3, 6, (3, 2), (2, 1), (2, 0), (2, 1), groups=3)
        self.same, self.wide_bn = nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), nn.BatchNorm2d(5)
        self.valid = nn.Conv2d(3, 5, 3, padding="valid")
        self.reflect = nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")
        self.fc, self.bn1d = nn.Linear(3, 7), nn.BatchNorm1d(7)
        self.prelu, self.one_slope = nn.PReLU(3), nn.PReLU()
        nn.init.uniform_(self.prelu.weight)
        self.register_buffer("offset", torch.randn(3, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


CASES: dict[str, tuple[Callable[[Parts, Tensor], object], list[str]]] = {
    "conv, batch norm, relu": (lambda m, x: F.relu(m.bn(m.conv(x))), ["Conv"]),
    "bias": (lambda m, x: F.relu_(m.bn(m.biased(x))), ["Conv"]),
    "without affine": (lambda m, x: m.plain(m.conv(x)), ["Conv"]),
    "batch norm twice": (lambda m, x: m.bn2(m.bn(m.biased(x))), ["Conv"]),
    "batch norm twice alone": (lambda m, x: m.bn2(m.bn(x)), ["Affine"]),
    "batch statistics": (lambda m, x: m.batch(m.conv(x)), ["Conv", "aten.batch_norm.default"]),
    "batch norm in front": (lambda m, x: m.conv(F.relu(m.bn(x))), ["Conv"]),
    "in front of two": (lambda m, x: (lambda a: m.conv(a) + m.biased(a))(F.relu(m.bn(x))), ["Conv", "Conv"]),
    "in front of one and another": (
        lambda m, x: (lambda a: m.conv(a) * a)(F.relu(m.bn(x))),
        ["Affine", "Conv", "aten.mul.Tensor"],
    ),
    "in front, and its residual": (lambda m, x: (lambda a: m.conv(a) + a)(m.bn(x)), ["Affine", "Conv"]),
    "convolution returned": (lambda m, x: (lambda z: (m.bn(z), z))(m.conv(x)), ["Conv", "Affine"]),
    "convolution read twice": (lambda m, x: (lambda z: m.bn(z) + z)(m.conv(x)), ["Conv", "Affine"]),
    "shared convolution": (lambda m, x: m.bn(m.conv(m.bn2(m.conv(x)))), ["Conv", "Conv"]),
    "shared batch norm": (lambda m, x: m.bn(m.biased(m.bn(m.conv(x)))), ["Conv", "Conv"]),
    "added to itself": (lambda m, x: (lambda y: F.relu(y + y))(m.bn(m.conv(x))), ["Conv", "Add"]),
    "residual": (lambda m, x: F.relu(m.bn(m.conv(x)) + x), ["Conv"]),
    "residual, in place": (lambda m, x: m.bn(m.conv(x)).add_(x).relu_(), ["Conv"]),
    "residual comes later": (
        lambda m, x: (lambda y: F.relu(y + F.max_pool2d(x, 3, 1, 1)))(m.bn(m.conv(x))),
        ["MaxPool", "Conv"],
    ),
    "two branches": (lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.biased(x))), ["Conv", "Conv"]),
    "two residuals": (lambda m, x: m.conv(x) + x + m.bn(x), ["Conv", "Affine"]),
    "batch norm of a sum": (lambda m, x: m.bn2(m.bn(m.conv(x)) + x), ["Conv", "Affine"]),
    "activation before the sum": (lambda m, x: F.relu(m.bn(m.conv(x))) + x, ["Conv", "Add"]),
    "activation before the batch norm": (lambda m, x: m.bn(F.relu(m.conv(x))), ["Conv", "Affine"]),
    "relu read before the sum": (lambda m, x: (lambda z: F.relu(z) + z)(m.conv(x)), ["Conv", "Act", "Add"]),
    "scaled sum": (lambda m, x: torch.add(m.conv(x), x, alpha=2), ["Conv", "aten.add.Tensor"]),
    "broadcast sum": (
        lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),
        ["Conv", "GlobalAvgPool", "aten.add.Tensor"],
    ),
    "sum with a buffer": (lambda m, x: m.conv(x) + m.offset, ["Conv", "aten.add.Tensor"]),
    "sum with a number": (lambda m, x: m.conv(x) + 3, ["Conv", "aten.add.Tensor"]),
    "write after a read": (
        lambda m, x: (lambda z: (lambda a: z.add_(x) * a)(F.relu(z)))(m.conv(x)),
        ["Conv", "Act", "Add", "aten.mul.Tensor"],
    ),
    "write that widens nothing": (lambda m, x: m.conv(x).add_(m.offset).relu_(), ["Conv", "aten.add.Tensor", "Act"]),
    "relu6": (lambda m, x: F.relu6(m.bn(m.conv(x))), ["Conv", "aten.relu6.default"]),
    "leaky relu": (lambda m, x: F.leaky_relu_(m.bn(m.conv(x)), 0.3), ["Conv"]),
    "prelu": (lambda m, x: m.prelu(m.bn(m.conv(x))), ["Conv"]),
    "prelu of one slope": (lambda m, x: m.one_slope(m.bn(x) + x), ["Affine"]),
    "sigmoid, tanh, silu": (lambda m, x: F.silu(torch.tanh(torch.sigmoid(m.conv(x)))), ["Conv", "Act", "Act"]),
    "groups, dilation, stride": (lambda m, x: F.relu(m.grouped(x)), ["Conv"]),
    "padding same": (lambda m, x: m.wide_bn(m.same(x)), ["aten.constant_pad_nd.default", "Conv"]),
    "padding valid": (lambda m, x: m.wide_bn(m.valid(x)), ["Conv"]),
    "padding reflect": (lambda m, x: m.wide_bn(m.reflect(x)), ["aten.pad.default", "Conv"]),
    "padding on one side": (lambda m, x: m.bn(m.conv(F.pad(x, (0, 1, 2, 0)))), ["aten.pad.default", "Conv"]),
    "linear and batch norm": (
        lambda m, x: F.relu(m.bn1d(m.fc(x.mean((2, 3))))),
        ["GlobalAvgPool", "Flatten", "Linear"],
    ),
    "batch norm of three dimensions": (
        lambda m, x: F.batch_norm(x.flatten(2), m.bn.running_mean, m.bn.running_var),
        ["aten.flatten.using_ints", "aten.batch_norm.default"],
    ),
    "pooling": (
        lambda _, x: F.avg_pool2d(F.max_pool2d(x, (3, 2), ceil_mode=True), 3, 2, 1, count_include_pad=False),
        ["MaxPool", "AvgPool"],
    ),
    "pooling with a divisor": (lambda _, x: F.avg_pool2d(x, 2, divisor_override=3), ["aten.avg_pool2d.default"]),
    "indices of a pooling": (lambda _, x: F.max_pool2d(x, 2, return_indices=True)[0], ["MaxPool"]),
    "dropout and identity": (lambda m, x: F.dropout(m.conv(x).clone(), 0.5, False).contiguous(), ["Conv"]),
    "dead branch": (lambda m, x: (m.biased(x), m.conv(x))[1], ["Conv"]),
    "the input": (lambda _, x: x, []),
    "index": (lambda m, x: m.conv(x)[:, m.order], ["Conv", "aten.index.Tensor"]),
    "split": (
        lambda m, x: torch.cat(torch.split(m.conv(x), [1, 2], 1)[::-1], 1),
        ["Conv", "aten.split_with_sizes.default", "aten.split_with_sizes.default", "aten.cat.default"],
    ),
    "computed weight": (lambda m, x: m.bn(F.conv2d(x, m.conv.weight / m.conv.weight.std())), ["Conv"]),
}


@pytest.mark.parametrize("name", CASES)
def test_folding(name: str) -> None:
    function, expected = CASES[name]
    graph = check(randomised(Parts(function)), shapes=((2, 11, 9), (1, 8, 13)), example=torch.zeros(2, 3, 10, 12))
    assert kinds(graph) == expected
    assert graph.extent is None
    known = {graph.input}
    for step in graph.steps:
        assert known.issuperset(step.inputs)
        assert step.output not in known
        known.add(step.output)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_go_where_eager_has_them(value: float) -> None:
    model = randomised(Parts(lambda m, x: F.max_pool2d(F.relu(m.bn(m.conv(x)) + m.bn2(m.biased(x))), 2)))
    x = torch.randn(2, 3, 9, 11)
    x[0, 1, 4, 5] = value
    with torch.no_grad():
        expected = model(x)
    got = run(build_graph(model), x)
    assert isinstance(got, Tensor)
    assert error(got, expected) <= 1e-5


def test_an_operand_is_padded_after_its_affine() -> None:
    """The zeros around the image are the convolution's, not the batch norm's."""
    tensors = {
        "weight": torch.ones(1, 1, 3, 3),
        "scale": torch.full((1,), 2.0),
        "shift": torch.full((1,), 5.0),
    }
    conv = Conv("c", (0,), 1, weight="weight", padding=(1, 1), scale="scale", shift="shift", pre=Activation("relu"))
    graph = Graph((conv,), 0, (1,), None, tensors, 1)
    got = run(graph, torch.ones(1, 1, 2, 2))
    assert isinstance(got, Tensor)
    assert got.tolist() == [[[[28.0, 28.0], [28.0, 28.0]]]]


def test_weights_are_rounded_once() -> None:
    """The folded weight is the float64 product's nearest float32, also after two batch norms."""
    model = randomised(Parts(lambda m, x: m.bn2(m.bn(m.biased(x)))))
    graph = build_graph(model)
    (step,) = graph.steps
    assert isinstance(step, Conv)
    assert step.bias is not None

    def terms(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        assert bn.running_var is not None
        assert bn.running_mean is not None
        scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
        return scale, bn.bias.double() - bn.running_mean.double() * scale

    (first, offset), (second, last) = terms(model.bn), terms(model.bn2)
    weight = model.biased.weight.double() * (first * second).view(-1, 1, 1, 1)
    bias = (model.biased.bias.double() * first + offset) * second + last
    assert torch.equal(graph.tensors[step.weight], weight.float())
    torch.testing.assert_close(graph.tensors[step.bias].double(), bias, rtol=2**-23, atol=1e-9)


def test_linear_takes_its_activation() -> None:
    graph = build_graph(randomised(Parts(lambda m, x: torch.sigmoid(m.fc(x.mean((2, 3)))))))
    assert isinstance(graph.steps[-1], Linear)
    assert graph.steps[-1].act == Activation("sigmoid")
    assert not Counter(kinds(graph))[Act.__name__] + Counter(kinds(graph))[Affine.__name__]
