"""NaN, infinities, signed zeros, denormals and the largest numbers come out as they do from eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from tests.ops.cases import DTYPES, LAYOUTS

pytestmark = pytest.mark.usefixtures("needs_extension")  # the stock path rounds, and overflows, in between

C = 5
SPECIALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0)


def _image(dtype: torch.dtype, layout: str, shape: tuple[int, ...] = (3, C, 5, 7)) -> Tensor:
    """Random numbers with every special value, the extremes of the dtype and a denormal strewn in."""
    x = testing.draw(shape, dtype)
    info = torch.finfo(dtype)
    specials = torch.tensor((*SPECIALS, info.max, -info.max, info.tiny, info.tiny / 4), dtype=torch.float64).to(dtype)
    where = torch.rand(shape) < 0.5
    picks = specials[torch.randint(len(specials), shape)]
    x = torch.where(where, picks, x)
    return x.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else x


def _assert_same_kind(ours: Tensor, eager: Tensor, what: str) -> None:
    inf = float("inf")
    for kind, a, b in (
        ("NaN", ours.isnan(), eager.isnan()),
        ("infinities", ours == inf, eager == inf),
        ("negative infinities", ours == -inf, eager == -inf),
    ):
        wrong = a != b
        assert not wrong.any(), f"{what}: {kind} in other places: got {ours[wrong][:5]}, expected {eager[wrong][:5]}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", testing.ACTIVATIONS)
def test_specials_through_eval_and_their_gradients(act: str, layout: str) -> None:
    slope = torch.full((C,), 0.25) if act == "prelu" else None
    mean, var = torch.zeros(C), torch.ones(C)
    weight, bias = torch.full((C,), 0.5), torch.zeros(C)  # 0.5: the largest number stays finite
    for dtype in (torch.float32, torch.bfloat16):
        x, r = _image(dtype, layout), _image(dtype, layout)
        dy = torch.ones_like(x)
        for residual in (None, r):
            ours_x, eager_x = x.clone().requires_grad_(), x.clone().requires_grad_()
            ours = fr.ops.batch_norm_act(
                ours_x, mean, var, weight, bias, residual=residual, act=act, act_weight=slope, eps=1e-12
            )
            pre = F.batch_norm(eager_x.float(), mean, var, weight, bias, eps=1e-12)
            eager = testing.activation(pre if residual is None else pre + residual.float(), act, act_weight=slope)
            narrow = eager.to(dtype)
            _assert_same_kind(ours, narrow, f"{act} {dtype} y")
            zero = (ours == 0) & (narrow == 0)
            if residual is None and act in ("identity", "relu", "leaky_relu", "prelu"):
                same = torch.signbit(ours)[zero] == torch.signbit(narrow)[zero]
                assert same.all(), f"{act} {dtype}: signs of zero differ"
            ours.backward(dy)
            eager.backward(dy.float())
            assert ours_x.grad is not None
            assert eager_x.grad is not None
            if act in ("relu", "leaky_relu", "prelu", "identity"):
                _assert_same_kind(ours_x.grad, eager_x.grad, f"{act} {dtype} gradient")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", testing.ACTIVATIONS)
def test_specials_through_add_act(act: str, layout: str) -> None:
    slope = torch.full((C,), 0.25) if act == "prelu" else None
    for dtype in DTYPES:
        x, r = _image(dtype, layout), _image(dtype, layout)
        ours = fr.ops.add_act(x, r, act, act_weight=None if slope is None else slope.to(testing.accumulator(dtype)))
        wide = testing.accumulator(dtype)
        eager = testing.activation(
            x.to(wide) + r.to(wide), act, act_weight=None if slope is None else slope.to(wide)
        ).to(dtype)
        _assert_same_kind(ours, eager, f"{act} {dtype}")
        if act in ("identity", "relu", "leaky_relu", "prelu"):
            exact = ours.isnan() | (ours == eager)
            assert exact.all(), f"{act} {dtype}: {ours[~exact]} instead of {eager[~exact]}"
            zero = ours == 0
            same = torch.signbit(ours)[zero] == torch.signbit(eager)[zero]
            assert same.all(), f"{act} {dtype}: signs of zero differ"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", testing.ACTIVATIONS)
def test_specials_through_the_stem(act: str, layout: str) -> None:
    slope = torch.full((C,), 0.25) if act == "prelu" else None
    mean, var = torch.zeros(C), torch.ones(C)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, C, 8, 9), (1, C, 1, 1), (2, C, 3, 2)):
            x = _image(dtype, layout, shape)
            ours = fr.ops.batch_norm_act_max_pool(x, mean, var, act=act, act_weight=slope, eps=1e-12)
            pre = F.batch_norm(x.float() * 0.5, mean, var * 0.25, eps=1e-12)
            eager = F.max_pool2d(testing.activation(pre, act, act_weight=slope), 3, 2, 1).to(dtype)
            _assert_same_kind(ours, eager, f"{act} {dtype} {shape}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["identity", "relu", "sigmoid"])
def test_pooling_ties_and_nan_route_gradients_as_max_pool2d_does(act: str, layout: str) -> None:
    """The first of equal values wins; a NaN wins over numbers, the last NaN over earlier ones."""
    values = torch.tensor([1.0, 1.0, 2.0, float("nan")])
    for probability in (0.0, 0.2):
        index = torch.randint(3, (2, C, 9, 10))
        index = torch.where(torch.rand(index.shape) < probability, 3, index)
        x = values[index]
        if layout == "NHWC":
            x = x.contiguous(memory_format=torch.channels_last)
        mean, var = torch.zeros(C), torch.ones(C)
        ours_x, eager_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = fr.ops.batch_norm_act_max_pool(ours_x, mean, var, act=act)
        eager = F.max_pool2d(testing.activation(F.batch_norm(eager_x, mean, var), act), 3, 2, 1)
        dy = torch.rand(eager.shape) + 0.5
        ours.backward(dy)
        eager.backward(dy)
        torch.testing.assert_close(ours, eager, equal_nan=True)
        torch.testing.assert_close(ours_x.grad, eager_x.grad, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_special_value_in_training_spoils_its_channel_and_no_other(value: float, layout: str) -> None:
    for shape in ((2, 8, 5, 3), (4, 40, 17, 19)):
        clean = testing.draw(shape, torch.float32)
        if layout == "NHWC":
            clean = clean.contiguous(memory_format=torch.channels_last)
        spoiled = clean.clone(memory_format=torch.preserve_format)
        spoiled[1, 3, 2, 1] = value
        results = []
        for x in (clean, spoiled):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
            y = fr.ops.batch_norm_act(leaf, mean, var, training=True)
            y.backward(torch.ones_like(y) * 0.5)
            assert leaf.grad is not None
            results.append((y.detach().transpose(0, 1), leaf.grad.transpose(0, 1), mean, var))
        others = torch.arange(shape[1]) != 3
        for a, b in zip(*results, strict=True):
            assert torch.equal(a[others], b[others])
        y, _, mean, var = results[1]
        assert y[3].isnan().all()
        assert not mean[3].isfinite()
        assert var[3].isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overflow_of_a_narrow_dtype_is_infinite_and_not_clamped(layout: str) -> None:
    x = torch.full((2, C, 3, 3), 60000.0, dtype=torch.float16)
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    y = fr.ops.add_act(x, x)
    assert (y == float("inf")).all()
    y = fr.ops.batch_norm_act(x, torch.zeros(C), torch.ones(C), torch.full((C,), -4.0), act="identity")
    assert (y == -float("inf")).all()
    denormal = torch.full((2, C, 3, 3), 2.0**-24, dtype=torch.float16)
    y = fr.ops.batch_norm_act(denormal, torch.zeros(C), torch.ones(C), eps=1e-12, act="identity")
    assert torch.equal(y, denormal)
