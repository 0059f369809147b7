"""What the dispatcher knows: opcheck of every registered operator, autocast's dtypes, fake tensors, functorch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import testing
from tests.ops.cases import LAYOUTS, OPS, Case, make, run
from tests.ops.conv_problems import Problem, draw, gradient_arguments, normed, packed_bits

pytestmark = pytest.mark.usefixtures("needs_extension")

ON_EVERY_DEVICE = (
    "batch_norm_act_forward",
    "batch_norm_act_apply",
    "batch_norm_act_add",
    "batch_norm_act_backward",
    "batch_norm_update_",
    "batch_norm_act_max_pool_forward",
    "batch_norm_act_max_pool_backward",
)
DEVICE_OPS = (
    *ON_EVERY_DEVICE,
    "conv2d_forward",
    "conv2d_backward",
    "conv2d_norm_forward",
    "conv2d_norm_backward",
    "conv2d_norm_backward_data",
    "conv2d_norm_backward_weight",
    "batch_norm_statistics",
    "batch_norm_input_gradient",
)
DIFFERENTIABLE_OPS = (
    "batch_norm_act",
    "batch_norm_act_dual",
    "batch_norm_act_conv",
    "batch_norm_act_max_pool",
    "add_act",
    "conv2d",
    "residual_block",
)
OPCHECKED_HERE = tuple(name for name in DIFFERENTIABLE_OPS if name != "residual_block")  # test_residual_block.py


def registered_for(device_type: str) -> list[str]:
    """The device operators that have a kernel there."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in DEVICE_OPS if has_kernel(f"fused_resnet::{name}", device_type.upper())]


def _op(name: str) -> Any:
    return getattr(torch.ops.fused_resnet, name).default


def _image(*shape: int, layout: str = "NHWC", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else x


def test_every_registered_operator_is_in_these_lists() -> None:
    prefix = "fused_resnet::"
    names = {
        schema.name.removeprefix(prefix) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(prefix)
    }
    assert names == {*DEVICE_OPS, *DIFFERENTIABLE_OPS}


def _device_samples(name: str, layout: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    c = 6
    x, dy, r = (_image(2, c, 5, 7, layout=layout, dtype=dtype) for _ in range(3))
    stat = testing.accumulator(dtype)
    mean, var, w, b = (torch.rand(c, dtype=stat) + 0.5 for _ in range(4))
    rstd = var.rsqrt()
    conv_weight = _image(4, c, 3, 3, layout=layout, dtype=dtype)
    pair, one = [1, 1], [2, 1]
    if name == "batch_norm_act_forward":
        return [
            (x, w, b, mean, var, None, None, None, None, None, None, True, False, False, 1e-5, 1e-5, 1, 0.01, True),
            (x, None, None, None, None, r, None, None, None, None, None, True, False, False, 1e-5, 1e-5, 1, 0.01, True),
            (x, w, b, mean, var, r, w, b, mean, var, None, True, True, True, 1e-5, 1e-5, 2, 0.01, True),
            (x, w, b, mean, var, r, w, b, mean, var, None, False, True, False, 1e-5, 1e-5, 6, 0.01, False),
            (x, w, None, mean, var, None, None, None, None, None, b, False, False, False, 1e-5, 1e-5, 3, 0.01, False),
        ]
    if name == "batch_norm_act_apply":
        return [(x, mean, rstd, w, b, None, 1, 0.01), (x, mean, rstd, None, None, w, 3, 0.01)]
    if name == "batch_norm_act_add":
        return [
            (x, mean, rstd, w, b, r, None, None, None, None, 1, 0.01, True),
            (x, mean, rstd, None, None, r, mean, rstd, w, b, 2, 0.01, True),
            (x, mean, rstd, w, None, r, mean, rstd, None, b, 6, 0.01, True),
            (x, mean, rstd, w, b, r, None, None, None, None, 1, 0.01, False),
        ]
    if name == "batch_norm_statistics":
        return [(x, None, None, True, 1e-5), (x, mean, var, False, 1e-3)]
    if name == "batch_norm_input_gradient":
        return [(dy, x, mean, rstd, w, b, var, True, r), (dy, x, mean, rstd, None, b, var, False, None)]
    if name == "batch_norm_act_backward":
        plain = (dy, x, mean, rstd, w, b, None, None, None, None, None, None, None, True, False, 1, 0.01)
        added = (dy, x, mean, rstd, w, b, r, None, None, None, None, None, None, False, False, 6, 0.01)
        dual = (dy, x, mean, rstd, w, b, r, mean, rstd, w, b, None, None, True, True, 6, 0.01)
        prelu = (dy, x, mean, rstd, None, None, None, None, None, None, None, w, None, True, False, 3, 0.01)
        yes, no = True, False
        return [
            (*plain, [yes, yes, yes, no, no, no, no]),
            (*plain, [no, yes, no, no, no, no, no]),
            (*added, [yes, yes, yes, yes, no, no, no]),
            (*dual, [yes, yes, yes, yes, yes, yes, no]),
            (*prelu, [yes, no, no, no, no, no, yes]),
        ]
    if name == "batch_norm_update_":
        return [(mean, var, w, b, 70, 0.1)]
    if name == "batch_norm_act_max_pool_forward":
        return [
            (x, w, b, mean, var, None, True, 1e-5, 1, 0.01, True),
            (x, None, None, mean, var, w, False, 1e-5, 3, 0.01, False),
        ]
    if name == "batch_norm_act_max_pool_backward":
        forward = _op("batch_norm_act_max_pool_forward")
        y, m, rs, _, argmax = forward(x, w, b, None, None, None, True, 1e-5, 1, 0.01, True)
        dpool = torch.randn_like(y)
        return [
            (dpool, x, argmax, m, rs, w, b, None, True, 1, 0.01, [True, True, True, False]),
            (dpool, x, argmax, m, rs, w, b, None, False, 1, 0.01, [False, True, False, False]),
        ]
    if name == "conv2d_forward":
        return [(x, conv_weight, None, pair, pair, pair, 1), (x, conv_weight, x.new_zeros(4), one, pair, pair, 1)]
    if name.startswith("conv2d_norm"):
        return _conv_norm_samples(name, layout, dtype)
    y = _op("conv2d_forward")(x, conv_weight, None, one, pair, pair, 1)
    return [
        (torch.randn_like(y), x, conv_weight, True, one, pair, pair, 1, [True, True, True]),
        (torch.randn_like(y), x, conv_weight, False, one, pair, pair, 1, [False, True, False]),
    ]


def _conv_norm_samples(name: str, layout: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for p in (
        Problem(2, 6, 5, 7, 4, act="relu", output_norm="train", mask=True),
        Problem(2, 5, 5, 7, 9, (1, 1), (2, 2), (0, 0), output_norm="eval", skip="masked"),
        Problem(1, 3, 9, 8, 8, (3, 2), (1, 2), (1, 0), (2, 1), act="silu", affine=False),
    ):
        p = replace(p, dtype=dtype, weight_layout=layout, float_weight=dtype == torch.bfloat16 and layout == "NHWC")
        o = draw(p)
        if layout == "NCHW":
            o.x, o.dy = o.x.contiguous(), o.dy.contiguous()
        if name == "conv2d_norm_forward":
            stat = testing.accumulator(dtype)
            running = torch.zeros(p.k, dtype=stat), torch.ones(p.k, dtype=stat)
            call = (o.x, *normed(o.norm), 1, 0.01, o.weight, *p.geometry)
            samples += [(*call, None, None, True, 1e-5), (*call, *running, False, 1e-5)]
            z = _op("conv2d_forward")(o.x, o.weight.to(dtype), None, *p.geometry)
            samples.append((*call, None, None, False, 1e-5, torch.zeros(p.k, dtype=dtype), z, False))
        elif name == "conv2d_norm_backward":
            skips = (o.skip, packed_bits(o.skip_mask))
            samples += [(*gradient_arguments(p, o), *skips, *p.geometry, bias) for bias in (False, True)]
        elif name == "conv2d_norm_backward_data":
            samples.append((*gradient_arguments(p, o), o.skip, packed_bits(o.skip_mask), *p.geometry))
        else:
            samples += [(*gradient_arguments(p, o), *p.geometry, bias) for bias in (False, True)]
    return samples


@pytest.mark.parametrize("name", DEVICE_OPS)
def test_opcheck_of_device_operators(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in LAYOUTS:
            for arguments in _device_samples(name, layout, dtype):
                torch.library.opcheck(
                    _op(name), arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
                )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPCHECKED_HERE)
def test_opcheck_of_differentiable_operators(name: str, layout: str) -> None:
    c = 4
    x, r = (_image(2, c, 5, 7, layout=layout).requires_grad_() for _ in range(2))
    w, b, rw, rb = (torch.rand(c).add_(0.5).requires_grad_() for _ in range(4))
    mean, var, r_mean, r_var = (torch.rand(c) + 0.5 for _ in range(4))
    conv_weight = torch.randn(3, c, 3, 3).requires_grad_()
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    wide = _image(2, 8, 5, 7, layout=layout).requires_grad_()  # ours in NHWC
    into = (torch.randn(3, 8, 3, 3).requires_grad_(), torch.randn(3).requires_grad_(), *geometry)
    of_wide = (wide, *(torch.rand(8) + 0.5 for _ in range(2)), *(torch.rand(8).requires_grad_() for _ in range(2)))
    samples: dict[str, list[tuple[Any, ...]]] = {
        "batch_norm_act": [
            (x, mean, var, w, b, None, None, True, 0.1, 1e-5, 1, 0.01),
            (x, mean, var, w, b, r, None, True, 0.1, 1e-5, 6, 0.01),
            (x, mean, var, w, b, r, None, False, 0.1, 1e-5, 1, 0.01),
            (x, None, None, None, None, None, rw, True, 0.1, 1e-5, 3, 0.01),
        ],
        "batch_norm_act_dual": [
            (x, mean, var, w, b, r, r_mean, r_var, rw, rb, None, True, 0.1, 1e-5, True, 0.1, 1e-5, 1, 0.01),
            (x, mean, var, w, b, r, r_mean, r_var, rw, rb, None, False, 0.1, 1e-5, False, 0.1, 1e-5, 5, 0.01),
        ],
        "batch_norm_act_conv": [
            (x, mean, var, w, b, None, True, 0.1, 1e-5, 1, 0.01, conv_weight, None, *geometry),
            (x, mean, var, w, b, None, False, 0.1, 1e-5, 1, 0.01, conv_weight, None, *geometry),
            (*of_wide, None, True, 0.1, 1e-5, 1, 0.01, *into),
            (*of_wide, None, False, 0.1, 1e-5, 6, 0.01, *into),
        ],
        "batch_norm_act_max_pool": [
            (x, mean, var, w, b, None, True, 0.1, 1e-5, 1, 0.01),
            (x, mean, var, w, b, None, False, 0.1, 1e-5, 6, 0.01),
        ],
        "add_act": [(x, r, None, 1, 0.01), (x, r, rw, 3, 0.01)],
        "conv2d": [(x, conv_weight, None, *geometry), (x, conv_weight, torch.randn(3).requires_grad_(), *geometry)],
    }
    for arguments in samples[name]:
        torch.library.opcheck(_op(name), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_eagers_dtypes(dtype: torch.dtype) -> None:
    x, r = _image(2, 6, 8, 8), _image(2, 6, 8, 8)
    w, b, conv_weight = torch.ones(6), torch.zeros(6), torch.randn(4, 6, 3, 3)

    def norm(t: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(t, None, None, w, b, True)

    with torch.autocast("cpu", dtype=dtype):
        narrow = torch.nn.functional.conv2d(x, conv_weight[:, :, :1, :1].repeat(2, 1, 1, 1)[:6])
        for value in (x, narrow):
            pairs = {
                "batch_norm_act": (
                    fr.ops.batch_norm_act(value, None, None, w, b, training=True),
                    torch.relu(norm(value)),
                ),
                "residual, same dtype": (
                    fr.ops.batch_norm_act(value, None, None, w, b, residual=value, training=True),
                    torch.relu(norm(value) + value),
                ),
                "residual, fp32": (
                    fr.ops.batch_norm_act(value, None, None, w, b, residual=r, training=True),
                    torch.relu(norm(value) + r),
                ),
                "max_pool": (
                    fr.ops.batch_norm_act_max_pool(value, None, None, w, b, training=True),
                    torch.nn.functional.max_pool2d(torch.relu(norm(value)), 3, 2, 1),
                ),
                "conv2d": (fr.ops.conv2d(value, conv_weight), torch.nn.functional.conv2d(value, conv_weight)),
                "batch_norm_act_conv": (
                    fr.ops.batch_norm_act_conv(value, None, None, w, b, conv_weight, training=True),
                    torch.nn.functional.conv2d(torch.relu(norm(value)), conv_weight),
                ),
                "conv_bn_act": (
                    fr.ops.conv_bn_act(value, conv_weight, None, None, training=True),
                    torch.relu(
                        torch.nn.functional.batch_norm(
                            torch.nn.functional.conv2d(value, conv_weight), None, None, training=True
                        )
                    ),
                ),
                "add_act": (fr.ops.add_act(value, r), torch.relu(value + r)),
            }
            for name, (ours, eager) in pairs.items():
                assert ours.dtype == eager.dtype, f"{name} of {value.dtype}: {ours.dtype}, eager {eager.dtype}"
                coarse = 8 * testing.unit_roundoff(dtype) * float(eager.abs().max())
                assert (ours.double() - eager.double()).abs().max() <= coarse, name


@pytest.mark.parametrize("op", OPS)
def test_autocast_gradients_have_the_leaves_dtype(op: str) -> None:
    operands = make(Case(op, (2, 5, 6, 4), torch.float32, "NHWC", "relu"))
    exact = run(operands)
    y_dtype = torch.bfloat16 if op == "conv" else torch.float32
    operands.grad_output = operands.grad_output.to(y_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(operands)
    for key, value in exact.items():
        assert got[key].dtype == (y_dtype if key == "y" else value.dtype), key


def test_fake_tensors_have_the_real_ones_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            x = _image(2, 6, 8, 10, layout=layout, dtype=dtype)
            weight = _image(4, 6, 3, 3, layout=layout, dtype=dtype)
            w = torch.ones(6)

            def all_of_them(x: Tensor, weight: Tensor, w: Tensor) -> list[Tensor]:
                return [
                    fr.ops.batch_norm_act(x, None, None, w, w, training=True, residual=x),
                    fr.ops.dual_batch_norm_act(x, None, None, w, w, x, None, None, training=True),
                    fr.ops.batch_norm_act_max_pool(x, None, None, w, w, training=True),
                    fr.ops.batch_norm_act_conv(x, None, None, w, w, weight, training=True, padding=1),
                    fr.ops.add_act(x, x),
                    fr.ops.conv2d(x, weight, stride=2),
                ]

            real = all_of_them(x, weight, w)
            mode = FakeTensorMode()
            with mode:
                fake = all_of_them(*(mode.from_tensor(t) for t in (x, weight, w)))
            for i, (a, b) in enumerate(zip(real, fake, strict=True)):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), (i, layout, dtype)


def test_meta_tensors() -> None:
    x = torch.empty(2, 6, 8, 10, device="meta")
    w = torch.empty(6, device="meta")
    assert fr.ops.batch_norm_act(x, w, w, w, w, training=True).shape == x.shape
    assert fr.ops.batch_norm_act_max_pool(x, w, w, w, w).shape == (2, 6, 4, 5)
    assert fr.ops.add_act(x, x).device.type == "meta"
