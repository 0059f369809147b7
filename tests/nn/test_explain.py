"""explain(): one row for each unit, the reason in words, and nothing of the model changed."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet as fr


class Net(nn.Module):
    """One block of each fate."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = fr.nn.BasicBlock(4, 4)
        self.hooked = fr.nn.BasicBlock(4, 4)
        self.hooked.conv2.register_forward_hook(lambda *_: None)
        shortcut = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.partly = fr.nn.Bottleneck(4, 1, downsample=shortcut)
        self.outside = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outside(self.partly(self.hooked(self.fused(x))))


def test_rows(fused: None) -> None:
    rows = {row.path: row for row in fr.nn.explain(Net())}
    assert list(rows) == ["fused", "hooked", "partly", "outside"]
    assert rows["fused"][1:] == ("BasicBlock", True, "")
    assert rows["hooked"][1:] == ("BasicBlock", False, "conv2 has a forward hook")
    assert rows["partly"].fused
    assert "shortcut is called: downsample has 3 children" in rows["partly"].why
    assert rows["outside"][1:3] == ("BatchNorm2d", False)


def test_table(fused: None) -> None:
    explanation = fr.nn.explain(Net())
    text = str(explanation)
    assert text.splitlines()[0].split() == ["module", "unit", "path", "why"]
    assert any(line.split()[:3] == ["fused", "BasicBlock", "fused"] for line in text.splitlines())
    assert text.endswith("2 of 4 units fused")
    assert explanation.fused == 2


def test_an_example_input_tells_what_the_inputs_decide(fused: None) -> None:
    net = Net().train()
    net.partly.eval()
    before = copy.deepcopy(net.state_dict())
    assert next(iter(fr.nn.explain(net, torch.zeros(2, 4, 5, 5)))).fused
    rows = {row.path: row for row in fr.nn.explain(net.to("meta"), torch.zeros(2, 4, 5, 5, device="meta"))}
    assert rows["fused"].why == "no kernel for device meta"
    assert net.fused.training
    assert not net.partly.bn1.training
    assert not net.fused._forward_pre_hooks
    assert list(before) == list(net.state_dict())


def test_an_example_input_leaves_the_statistics(fused: None) -> None:
    net = Net().train()
    before = copy.deepcopy(net.state_dict())
    fr.nn.explain(net, (torch.randn(2, 4, 5, 5),))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_hooks_go_even_when_the_model_fails(fused: None) -> None:
    net = Net().train()
    with pytest.raises(RuntimeError):
        fr.nn.explain(net, torch.randn(2, 3, 5, 5))
    assert net.training
    assert not net.fused._forward_pre_hooks


def test_without_the_extension_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_resnet.nn.guard._UNAVAILABLE", "there is no extension")
    assert all(row.why == "there is no extension" for row in fr.nn.explain(fr.nn.BasicBlock(4, 4)))


def test_stem(fused: None) -> None:
    model = fr.models.resnet18()
    assert fr.nn.explain(model).fused == 9
    model.maxpool = nn.Identity()
    assert fr.nn.explain(model)[0] == (
        "(model)",
        "ResNet",
        True,
        "but maxpool is called: it is Identity, not MaxPool2d",
    )


def test_units_within_units_keep_their_parent_fused(fused: None) -> None:
    shortcut = fr.convert(nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)))
    net = nn.Sequential(fr.convert(Shortcut(shortcut)))
    without, having = fr.nn.explain(net), fr.nn.explain(net, torch.zeros(2, 4, 5, 5))
    assert [row[:3] for row in having] == [row[:3] for row in without]
    assert having[0].fused


class Shortcut(nn.Module):
    """A block whose shortcut is a unit itself."""

    def __init__(self, downsample: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)) + self.downsample(x))


class Squeezed(fr.nn.BasicBlock):
    """A block with a forward of its own, which calls the children."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y * y.mean((2, 3), keepdim=True) + x)


@pytest.mark.parametrize("example", [None, torch.zeros(2, 4, 5, 5)], ids=["static", "run"])
def test_a_subclass_with_its_own_forward_is_stock(example: torch.Tensor | None, fused: None) -> None:
    (row,) = fr.nn.explain(nn.Sequential(Squeezed(4, 4)), example)
    assert not row.fused
    assert row.why == "its forward is not this package's"
