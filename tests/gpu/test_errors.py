"""Operands on two devices: an error that names operator, argument, what was expected and what came; nothing changes."""

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.bad_input.cases_norm import NORM_OPS, operands

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_device")]


def _other(device: torch.device) -> str:
    return "cpu" if device.type == "cuda" else "meta"


def _cases() -> list[tuple[str, str]]:
    return [
        (op, name)
        for op in (*NORM_OPS, "add_act")
        for name, value in operands(op).items()
        if isinstance(value, Tensor) and name != "x"
    ]


@pytest.mark.parametrize(("op", "argument"), _cases())
def test_an_argument_on_another_device_is_named(op: str, argument: str, on_device: torch.device) -> None:
    arguments = operands(op)
    arguments[argument] = arguments[argument].to(_other(on_device))
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError) as error:
        getattr(fr.ops, op)(**arguments)
    for word in (op, argument, "expected", "got", on_device.type, _other(on_device)):
        assert word in str(error.value), str(error.value)
    for name, value in before.items():
        assert value.is_meta or torch.equal(arguments[name], value), f"{name} has changed"


@pytest.mark.parametrize("op", [*NORM_OPS, "add_act"])
def test_x_on_another_device_is_an_error(op: str, on_device: torch.device) -> None:
    arguments = operands(op)
    arguments["x"] = arguments["x"].to(_other(on_device))
    with pytest.raises(RuntimeError, match=r"device|on cpu|on cuda"):
        getattr(fr.ops, op)(**arguments)


def test_a_model_on_one_device_and_images_on_another(on_device: torch.device) -> None:
    model = fr.models.resnet18(num_classes=4)
    before = model.bn1.running_mean.clone()
    with pytest.raises(RuntimeError, match=r"device|type"):  # a stock convolution speaks of types
        model(torch.randn(2, 3, 32, 32, device=_other(on_device)))
    assert torch.equal(model.bn1.running_mean, before)
