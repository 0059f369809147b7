"""Two hundred steps on scikit-learn's digits: fused training is as close to the stock curve as stock is to itself.

Training is chaotic: two runs that differ in one rounding part after some tens of steps. What stock PyTorch makes of
weights that differ in their last bits is therefore the measure, and smoothed curves are compared.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet as fr

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("needs_extension")

STEPS, BATCH, WINDOW = 200, 32, 20


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long()


class _Network(torch.nn.Module):
    """The first two stages of a CIFAR ResNet: identity shortcuts, a strided one, 3x3 convolutions only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(16)

        def shortcut() -> torch.nn.Sequential:
            return torch.nn.Sequential(torch.nn.Conv2d(16, 32, 1, 2, bias=False), torch.nn.BatchNorm2d(32))

        self.blocks = torch.nn.Sequential(
            fr.nn.BasicBlock(16, 16),
            fr.nn.BasicBlock(16, 32, 2, shortcut()),
            fr.nn.Bottleneck(32, 8),
            fr.nn.BasicBlock(32, 32),
        )
        self.fc = torch.nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm(self.stem(x))))
        result: Tensor = self.fc(y.mean((2, 3)))
        return result


def _curve(network: torch.nn.Module, narrow: bool) -> Tensor:
    """Losses of all steps; the batches are the same for every call."""
    x, labels = _digits()
    order = torch.Generator().manual_seed(7)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(STEPS):
        picked = torch.randint(len(x), (BATCH,), generator=order)
        batch = x[picked].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = F.cross_entropy(network(batch).float(), labels[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()


def _smooth(curve: Tensor) -> Tensor:
    return curve.unfold(0, WINDOW, 1).mean(1)


def _nudged(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same network but for the last bits of its weights."""
    twin = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1 + torch.randn(p.shape, generator=generator) * 1e-7)
    return twin


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16 autocast"])
def test_loss_curve(narrow: bool) -> None:
    network = _Network().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        x = _digits()[0][:2]
        assert "ResidualBlock" in copy.deepcopy(network).blocks(F.relu(network.stem(x))).grad_fn.name()
    fused = _curve(copy.deepcopy(network), narrow)
    with fr.nn.stock():
        stock = _curve(copy.deepcopy(network), narrow)
        others = [_curve(_nudged(network, seed), narrow) for seed in range(2)]

    u = torch.finfo(torch.bfloat16 if narrow else torch.float32).eps / 2
    assert (fused[0] - stock[0]).abs() <= 64 * u * stock[0], "the first step has the same weights"
    early = (fused[:3] - stock[:3]).abs().max()
    assert early <= (0.1 if narrow else 1e-4), "nor have the next ones parted far"

    curves = [stock, *others]
    noise = max((_smooth(a) - _smooth(b)).abs().max() for i, a in enumerate(curves) for b in curves[:i])
    apart = (_smooth(fused) - torch.stack([_smooth(c) for c in curves]).mean(0)).abs().max()
    assert apart <= 3 * noise + 0.02, f"smoothed curves are {apart:.3f} apart, stock's own {noise:.3f}"
    assert fused[:5].mean() > 1.5
    for curve in (fused, stock):
        assert curve[-WINDOW:].mean() < 0.1, f"ended at {curve[-WINDOW:].mean():.3f}"
