"""The block as one operator: opcheck, derivatives of first and second order, and what is saved for backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.ops.conv_problems import channels_last, op

pytestmark = pytest.mark.usefixtures("needs_extension")

EPS = 1e-2
# Kernel, stride, padding of the main path's convolutions.
Layer = tuple[int, int, int]
BASIC: tuple[Layer, ...] = ((3, 1, 1), (3, 1, 1))
BOTTLENECK: tuple[Layer, ...] = ((1, 1, 0), (3, 1, 1), (1, 1, 0))


class Block:
    """Parameters of one call; `leaves` are what it is differentiated by."""

    def __init__(
        self,
        layers: Sequence[Layer],
        stride: int = 1,
        downsample: bool = False,
        training: Sequence[bool] | None = None,
        width: int = 3,
        dtype: torch.dtype = torch.float64,
        layout: torch.memory_format = torch.channels_last,
        preact: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

        inputs = 2 if downsample else width
        strided = (len(layers) - 1) // 2  # the 3x3 in the middle, or the first of two
        self.layers = [(k, stride if i == strided else s, p) for i, (k, s, p) in enumerate(layers)]
        shapes = [(width, inputs if i == 0 else width, k, k) for i, (k, _, _) in enumerate(self.layers)]
        if downsample:
            self.layers.append((1, stride, 0))
            shapes.append((width, inputs, 1, 1))
        self.downsample, self.preact = downsample, preact
        channels = [inputs, *[width] * (len(layers) - 1)] if preact else [width] * len(shapes)
        self.training = list(training or [True] * len(channels))
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = random(2, inputs, 4, 5).to(dtype).contiguous(memory_format=layout).requires_grad_()
        self.convs = [random(*shape).to(dtype).requires_grad_() for shape in shapes]
        self.weights = [random(c, low=0.5, high=1.5).to(stat).requires_grad_() for c in channels]
        self.biases = [random(c).to(stat).requires_grad_() for c in channels]
        self.means = [random(c).to(stat) for c in channels]
        self.vars = [random(c, low=0.5, high=1.5).to(stat) for c in channels]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.convs, *self.weights, *self.biases]

    def arguments(self, leaves: Sequence[Tensor] | None = None) -> tuple[Any, ...]:
        n, norms = len(self.convs), len(self.weights)
        x, *rest = self.leaves if leaves is None else leaves
        geometry = [v for _, s, p in self.layers for v in (s, s, p, p, 1, 1, 1)]
        lists = (rest[:n], rest[n : n + norms], rest[n + norms :], self.means, self.vars)
        return (x, *lists, self.training, [EPS] * norms, geometry, self.downsample, False, self.preact)

    def call(self, *leaves: Tensor) -> Tensor:
        y: Tensor = op("residual_block")(*self.arguments(leaves or None))[0]
        return y

    def eager(self, *leaves: Tensor) -> Tensor:
        x, convs, weights, biases, *_ = self.arguments(leaves or None)

        def conv(i: int, y: Tensor) -> Tensor:
            _, stride, padding = self.layers[i]
            return F.conv2d(y, convs[i], None, stride, padding)

        def norm(i: int, z: Tensor) -> Tensor:
            mean, var = (None, None) if self.training[i] else (self.means[i], self.vars[i])
            return F.batch_norm(z, mean, var, weights[i], biases[i], self.training[i], 0.0, EPS)

        def unit(i: int, y: Tensor) -> Tensor:
            return norm(i, conv(i, y))

        main = len(convs) - int(self.downsample)
        y = x
        if self.preact:
            first = y = F.relu(norm(0, x))
            for i in range(main):
                y = conv(i, y) if i == 0 else conv(i, F.relu(norm(i, y)))
            return y + (conv(main, first) if self.downsample else x)
        for i in range(main):
            y = unit(i, y)
            y = y if i == main - 1 else F.relu(y)
        return F.relu(y + (unit(main, x) if self.downsample else x))


BLOCKS = {
    "basic": lambda **o: Block(BASIC, **o),
    "basic, stride": lambda **o: Block(BASIC, stride=2, downsample=True, **o),
    "bottleneck": lambda **o: Block(BOTTLENECK, **o),
    "bottleneck, stride": lambda **o: Block(BOTTLENECK, stride=2, downsample=True, **o),
    "one convolution": lambda **o: Block(BASIC[:1], **o),
    "frozen": lambda **o: Block(BASIC, training=[False, False], **o),
    "frozen first, downsample": lambda **o: Block(BASIC, downsample=True, training=[False, True, True], **o),
    "frozen last, downsample": lambda **o: Block(BASIC, downsample=True, training=[True, False, True], **o),
    "preact basic": lambda **o: Block(BASIC, preact=True, **o),
    "preact basic, stride": lambda **o: Block(BASIC, stride=2, downsample=True, preact=True, **o),
    "preact bottleneck": lambda **o: Block(BOTTLENECK, preact=True, **o),
    "preact bottleneck, stride": lambda **o: Block(BOTTLENECK, stride=2, downsample=True, preact=True, **o),
    "preact, one convolution": lambda **o: Block(BASIC[:1], preact=True, **o),
    "preact, frozen first": lambda **o: Block(BASIC, preact=True, training=[False, True], **o),
    "preact, frozen last, downsample": lambda **o: Block(
        BASIC, preact=True, downsample=True, training=[True, False], **o
    ),
    "preact, frozen": lambda **o: Block(BASIC, preact=True, downsample=True, training=[False, False], **o),
    "frozen shortcut": lambda **o: Block(BOTTLENECK, downsample=True, training=[True, True, True, False], **o),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_value_and_statistics(name: str) -> None:
    block = BLOCKS[name]()
    y, *statistics = op("residual_block")(*block.arguments())
    torch.testing.assert_close(y, block.eager(), rtol=1e-10, atol=1e-10)
    assert len(statistics) == 2 * sum(block.training)
    assert not any(t.requires_grad for t in statistics)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck(name: str) -> None:
    block = BLOCKS[name]()
    assert gradcheck(block.call, block.leaves, nondet_tol=0.0)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradgradcheck(name: str) -> None:
    block = BLOCKS[name]()
    assert gradgradcheck(block.call, block.leaves, nondet_tol=1e-12, fast_mode=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_first_and_second_order_equal_eager(name: str) -> None:
    block = BLOCKS[name]()
    results = []
    for function in (block.call, block.eager):
        first = torch.autograd.grad(function().square().sum(), block.leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), block.leaves)
        plain = torch.autograd.grad(function().square().sum(), block.leaves)
        results.append((*first, *second, *plain))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        "basic",
        "bottleneck, stride",
        "frozen first, downsample",
        "preact basic, stride",
        "preact bottleneck",
        "preact, frozen last, downsample",
    ],
)
def test_every_subset_of_gradients(name: str) -> None:
    """Each leaf alone, and all but it: the same numbers as all together, and none for the others."""
    full = BLOCKS[name]()
    want = torch.autograd.grad(full.call().square().sum(), full.leaves)
    for i in range(len(want)):
        for alone in (True, False):
            block = BLOCKS[name]()
            for j, leaf in enumerate(block.leaves):
                leaf.requires_grad_((i == j) == alone)
            block.call().square().sum().backward()
            for j, (leaf, expected) in enumerate(zip(block.leaves, want, strict=True)):
                if (i == j) != alone:
                    assert leaf.grad is None
                    continue
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("missing", ["weights", "biases", "both"])
def test_batch_norms_without_weight_or_bias(missing: str, preact: bool) -> None:
    results = []
    for function in ("call", "eager"):
        block = Block(BASIC, downsample=True, preact=preact)
        for name in ("weights", "biases"):
            if missing in (name, "both"):
                setattr(block, name, [None, *getattr(block, name)[1:]])
        leaves = [leaf for leaf in block.leaves if leaf is not None]
        results.append(torch.autograd.grad(getattr(block, function)().square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_are_x_z_statistics_parameters_and_bits(dtype: torch.dtype) -> None:
    block = Block(BOTTLENECK, downsample=True, width=9, dtype=dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = block.call()
    images = [t for t in saved if t.dim() == 4 and t.data_ptr() not in {w.data_ptr() for w in block.convs}]
    assert sum(t.data_ptr() == block.x.data_ptr() for t in images) == 1
    assert len(images) == 1 + 4, "x and the four convolutions' outputs"
    assert not any(t.data_ptr() == y.data_ptr() for t in images)
    bits = [t for t in saved if t.dtype == torch.uint8]
    assert [t.numel() for t in bits] == [2 * 4 * 5 * 2]  # 9 channels in two bytes
    own = {leaf.data_ptr() for leaf in block.leaves}
    vectors = [t for t in saved if t.dim() == 1 and t.dtype != torch.uint8 and t.data_ptr() not in own]
    assert len(vectors) == 4 * 2, "mean and rstd of four batch norms"
    assert len(saved) == 5 + 1 + 8 + 4 * 3


def test_before_activation_the_last_output_and_the_shortcut_are_not_saved() -> None:
    block = Block(BOTTLENECK, downsample=True, preact=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block.call()
    images = [t for t in saved if t.dim() == 4 and t.data_ptr() not in {w.data_ptr() for w in block.convs}]
    assert len(images) == 3, "x and what the first two convolutions put out"
    assert not any(t.dtype == torch.uint8 for t in saved)


@pytest.mark.parametrize("preact", [False, True])
def test_saved_tensors_may_come_back_in_another_layout(preact: bool) -> None:
    """save_on_cpu(pin_memory=True) and hooks that write to files give back contiguous tensors: the same numbers."""
    for shape in ((2, 8, 8, 8), (2, 8, 5, 3)):
        x = channels_last(torch.randn(shape, dtype=torch.float64)).requires_grad_()
        block = Block(BASIC, width=8, preact=preact)
        leaves = [x, *block.leaves[1:]]
        results = []
        for pack in (lambda t: t, lambda t: t.contiguous()):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = block.call(*leaves)
            results.append(torch.autograd.grad(y.square().sum(), leaves))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, layout: torch.memory_format) -> None:
    for block in (
        Block(BASIC, dtype=dtype, layout=layout),
        Block(BOTTLENECK, stride=2, downsample=True, training=[True, False, True, True], dtype=dtype, layout=layout),
        Block(BASIC, stride=2, downsample=True, preact=True, dtype=dtype, layout=layout),
    ):
        torch.library.opcheck(op("residual_block"), block.arguments())
        no_gradients = block.arguments([t.detach() for t in block.leaves])
        torch.library.opcheck(op("residual_block"), no_gradients)


def test_lists_that_do_not_fit_are_refused() -> None:
    arguments = list(Block(BASIC).arguments())
    for i in (1, 2, 3, 4, 5, 6, 7, 8):
        short = [*arguments[:i], arguments[i][:-1], *arguments[i + 1 :]]
        with pytest.raises(RuntimeError, match="residual_block: expected"):
            op("residual_block")(*short)
    with pytest.raises(RuntimeError, match=r"residual|shape"):
        op("residual_block")(*Block(BASIC, stride=2).arguments())  # x does not fit the output
    with pytest.raises(RuntimeError, match="expected skip of shape"):
        op("residual_block")(*Block(BASIC, stride=2, preact=True).arguments())
