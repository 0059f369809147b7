"""The CIFAR networks: structure, shortcuts, fusion and gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.models import cifar
from fused_resnet.models.cifar import CifarResNet, PadShortcut
from fused_resnet.models.plain import PlainBlock

KINDS = ("A", "B", None)


def small(shortcut: str | None, **kwargs: object) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(2, shortcut=shortcut, **kwargs).double()  # type: ignore[arg-type]


def images(channels: int = 3) -> Tensor:
    return torch.randn(3, channels, 16, 16, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x)
    found = torch.autograd.grad((y * y).sum(), [x, *model.parameters()])
    return y, list(found), [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_weighted_layers(depth: int) -> None:
    for make in (getattr(cifar, f"resnet{depth}"), getattr(cifar, f"plain{depth}")):
        with torch.device("meta"):
            layers = [m for m in make().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth


def test_extents_and_widths_of_the_stages() -> None:
    model, shapes = cifar.resnet20(), []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _m, _i, y: shapes.append(tuple(y.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_arguments() -> None:
    model = cifar.resnet20(num_classes=7, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="expected shortcut to be 'A', 'B' or None, got 'C'"):
        cifar.resnet20(shortcut="C")
    with pytest.raises(ValueError, match="at least one block"):
        CifarResNet(0)
    with pytest.raises(TypeError, match="no shortcuts"):
        cifar.plain20(shortcut="A")


def test_option_a_subsamples_and_pads_with_zeros() -> None:
    x = images(2)
    y = PadShortcut(2, 5, 2)(x)
    assert y.shape == (3, 5, 8, 8)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


def test_option_a_has_no_keys_and_keeps_channels_last() -> None:
    assert not any("downsample" in key for key in cifar.resnet20().state_dict())
    assert any("downsample" in key for key in cifar.resnet20(shortcut="B").state_dict())
    y = PadShortcut(4, 8, 2)(images(4).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_initial_weights_are_he_et_als() -> None:
    weight = cifar.resnet20().layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_plain_blocks_have_no_shortcut() -> None:
    blocks = [m for m in cifar.plain20().modules() if isinstance(m, PlainBlock)]
    assert len(blocks) == 9
    block = blocks[0].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert not block(torch.randn(1, 16, 8, 8)).any()


@pytest.mark.parametrize("shortcut", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_fused_equals_stock(shortcut: str | None, training: bool) -> None:
    model = small(shortcut).train(training)
    twin = copy.deepcopy(model)
    x = images()
    ours = gradients(model, x)
    with fr.nn.stock():
        theirs = gradients(twin, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("shortcut", KINDS)
def test_every_unit_is_fused(shortcut: str | None) -> None:
    model = small(shortcut)
    table = fr.nn.explain(model, images())
    assert table.fused == len(table) == 7, str(table)


@pytest.mark.parametrize("shortcut", KINDS)
def test_copies_and_scripts(shortcut: str | None) -> None:
    model, x = small(shortcut).eval(), images()
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.parametrize("shortcut", KINDS)
def test_other_norms_run_stock(shortcut: str | None) -> None:
    model = small(shortcut, norm_layer=lambda planes: nn.GroupNorm(4, planes))
    assert model(images()).shape == (3, 10)
    assert fr.nn.explain(model).fused == 0


def test_weights_argument_loads() -> None:
    source = small("B").float()
    with pytest.raises(RuntimeError, match=r"missing: .*layer1\.2\.conv1\.weight"):
        cifar.resnet20(shortcut="B", weights=source.state_dict())
    source = cifar.resnet20(shortcut="B")
    loaded = cifar.resnet20(shortcut="B", weights=source.state_dict())
    assert torch.equal(loaded.fc.weight, source.fc.weight)
