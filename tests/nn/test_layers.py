"""BatchNormAct2d and ConvBNAct2d: state_dict, every activation, and the fused path against the stock one."""

import copy
from collections import Counter

import pytest
import torch
import torch.fx
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing
from fused_resnet.nn import guard
from tests.nn.twins import assert_fused_equals_stock, randomise, run

ACTIVATIONS = testing.ACTIVATIONS


@pytest.fixture
def x() -> Tensor:
    return testing.draw((3, 6, 5, 7), torch.float32)


def test_it_is_not_a_batch_norm_to_torchs_tools() -> None:
    layer = fr.nn.BatchNormAct2d(6)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0] is layer


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": torch.float64}], ids=str
)
def test_state_dict_is_that_of_batch_norm(options: dict[str, object]) -> None:
    ours, theirs = fr.nn.BatchNormAct2d(6, **options), nn.BatchNorm2d(6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_state_dict_older_than_the_counter() -> None:
    state = nn.BatchNorm2d(6).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    fr.nn.BatchNormAct2d(6).load_state_dict(state)


def test_prelu_has_a_parameter() -> None:
    layer = fr.nn.BatchNormAct2d(6, act="prelu")
    assert "act_weight" in dict(layer.named_parameters())
    assert torch.equal(layer.act_weight, torch.full((6,), 0.25))


@pytest.mark.parametrize("layer", [fr.nn.BatchNormAct2d, lambda c, act: fr.nn.ConvBNAct2d(c, c, 1, act=act)])
def test_an_unknown_activation(layer: type) -> None:
    with pytest.raises(ValueError, match=r"act.*'gelu'"):
        layer(6, act="gelu")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_act_equals_stock(act: str, residual: bool, training: bool, x: Tensor, calls: Counter[str]) -> None:
    layer = randomise(fr.nn.BatchNormAct2d(6, act=act, negative_slope=0.2)).train(training)
    others = (testing.draw(tuple(x.shape), torch.float32),) if residual else ()
    assert_fused_equals_stock(layer, x, *others)
    assert calls == {"batch_norm_act": 1}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_stock_path_is_the_formula(act: str, x: Tensor) -> None:
    layer = randomise(fr.nn.BatchNormAct2d(6, act=act, negative_slope=0.2)).double()
    norm = nn.BatchNorm2d(6).double()
    norm.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "act_weight"})
    residual = torch.randn_like(x, dtype=torch.float64)
    pre = norm(x.double()) + residual
    want = {
        "identity": lambda: pre,
        "relu": lambda: F.relu(pre),
        "leaky_relu": lambda: F.leaky_relu(pre, 0.2),
        "prelu": lambda: F.prelu(pre, torch.full((6,), 0.25, dtype=torch.float64)),
        "sigmoid": lambda: torch.sigmoid(pre),
        "tanh": lambda: torch.tanh(pre),
        "silu": lambda: F.silu(pre),
    }[act]()
    with fr.nn.stock():
        torch.testing.assert_close(layer(x.double(), residual), want, rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(layer.get_buffer(name), norm.get_buffer(name))


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_options(options: dict[str, object], training: bool, x: Tensor, calls: Counter[str]) -> None:
    layer = randomise(fr.nn.BatchNormAct2d(6, **options)).train(training)
    for _ in range(2):
        assert_fused_equals_stock(layer, x)
        layer(x)
    assert calls["batch_norm_act"] == 4


def test_a_residual_of_another_dtype_is_added_by_stock_pytorch(x: Tensor, calls: Counter[str]) -> None:
    got = fr.nn.BatchNormAct2d(6)(x, x.double())
    assert got.dtype == torch.float64
    got = fr.nn.ConvBNAct2d(6, 6, 1)(x, x.double())
    assert got.dtype == torch.float64
    assert calls == {"conv2d": 1}


def test_reset(x: Tensor) -> None:
    layer = fr.nn.BatchNormAct2d(6, act="prelu")
    fresh = copy.deepcopy(layer.state_dict())
    randomise(layer)(x)
    layer.reset_parameters()
    assert all(torch.equal(fresh[key], value) for key, value in layer.state_dict().items())


def test_meta_device() -> None:
    layer = fr.nn.BatchNormAct2d(6, act="prelu", device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.running_var, torch.ones(6))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_conv_bn_act_equals_stock(act: str, residual: bool, x: Tensor, calls: Counter[str]) -> None:
    layer = randomise(fr.nn.ConvBNAct2d(6, 4, 3, act=act, negative_slope=0.2))
    others = (testing.draw((3, 4, 5, 7), torch.float32),) if residual else ()
    assert_fused_equals_stock(layer, x, *others)
    assert calls == {"conv2d": 1, "batch_norm_act": 1}


def test_conv_bn_act_children_and_padding(x: Tensor) -> None:
    layer = fr.nn.ConvBNAct2d(6, 4, (3, 5), 2, dilation=2, groups=2)
    assert [n for n, _ in layer.named_children()] == ["conv", "bn"]
    assert type(layer.conv) is nn.Conv2d
    assert type(layer.bn) is nn.BatchNorm2d
    assert layer.conv.padding == (2, 4)
    assert layer.conv.bias is None
    assert layer(x).shape == (3, 4, 3, 4)


@pytest.mark.parametrize("child", ["conv", "bn"])
def test_conv_bn_act_is_guarded(child: str, x: Tensor, calls: Counter[str]) -> None:
    layer = fr.nn.ConvBNAct2d(6, 4, 3)
    seen = []
    layer.get_submodule(child).register_forward_hook(lambda *_: seen.append(child))
    assert guard.why_stock(layer) == f"{child} has a forward hook"
    layer(x)
    assert seen == [child]
    assert not calls


@pytest.mark.parametrize("layer", [fr.nn.BatchNormAct2d(6), fr.nn.ConvBNAct2d(6, 6, 3)], ids=["norm", "conv"])
def test_script_trace_compile(layer: nn.Module, x: Tensor, fused: None) -> None:
    layer = randomise(layer).eval()
    want = run(layer, x)["output"]
    torch.testing.assert_close(torch.jit.script(layer)(x), want)
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), want)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


def test_symbolic_trace(x: Tensor) -> None:
    layer = fr.nn.BatchNormAct2d(6)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(traced(x), layer(x))


def test_wrong_rank() -> None:
    with pytest.raises(ValueError, match="4D"):
        fr.nn.BatchNormAct2d(6)(torch.zeros(3, 6))


@pytest.mark.parametrize("how", ["pruned", "parametrised", "no eps"])
def test_what_cannot_be_read_runs_stock(how: str, x: Tensor) -> None:
    layer = fr.nn.BatchNormAct2d(6).eval()
    if how == "pruned":
        nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    elif how == "parametrised":
        nn.utils.parametrizations.weight_norm(layer, "weight", dim=None)
    else:
        layer.eps = 0.0
    assert guard.why_stock(layer, x) is not None
    expected = F.relu(F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps))
    assert torch.equal(layer(x), expected)
