"""How often bfloat16 changes the answer: the class with the largest logit."""

import copy

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet.nn.guard import stock
from tests.inference.agreement import randomised

pytestmark = pytest.mark.usefixtures("needs_extension")

IMAGES, CLASSES = 2048, 10


def agreement(a: Tensor, b: Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).double().mean())


def test_bfloat16_answers_as_often_as_eager_bfloat16_does() -> None:
    """Against fp32 and against eager bfloat16, which both round: where logits are close, either may turn the answer."""
    torch.manual_seed(1)
    model = randomised(fr.models.cifar.resnet20(num_classes=CLASSES))
    x = torch.randn(IMAGES, 3, 32, 32) + torch.randn(IMAGES, 3, 1, 1)
    with torch.no_grad(), stock():
        model.fc.bias.sub_(model(x[:512]).mean(0))  # every class is somebody's answer
        exact = model(x)
        eager = copy.deepcopy(model).bfloat16()(x.bfloat16()).float()
    ours = fr.optimize_for_inference(model, dtype=torch.bfloat16)(x)
    assert exact.argmax(1).bincount(minlength=CLASSES).min() > 0
    rate = agreement(eager, exact)
    assert rate < 1  # or nothing is compared
    noise = 3 * (2 * rate * (1 - rate) / IMAGES) ** 0.5  # of the difference of two counted rates
    assert agreement(ours, exact) >= rate - noise
    # Both round, so both roundings stand between them.
    both = 1 - (1 - rate) * 2**0.5
    assert agreement(ours, eager) >= both - noise
