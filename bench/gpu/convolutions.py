"""The distinct convolutions of ResNets, and PyTorch's own (plain cuDNN) three passes over one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fused_resnet as fr


@dataclass(frozen=True)
class Conv:
    """One shape of convolution; square kernel, equal stride and padding both ways."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    height: int
    width: int
    count: int = 1  # how often the models hold it

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.kernel}x{self.kernel}/{self.stride} {self.height}x{self.width}"

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in (self.height, self.width))
        return height, width

    def flops(self, batch: int) -> float:
        """Of one pass."""
        height, width = self.output_size
        return 2.0 * batch * height * width * self.inputs * self.outputs * self.kernel**2


def convolutions(names: Sequence[str], size: int = 224) -> list[Conv]:
    """The distinct convolutions of these models in order of their first appearance; nothing is computed."""
    found: dict[Conv, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        height, width = inputs[0].shape[2:]
        geometry = module.kernel_size[0], module.stride[0], int(module.padding[0])
        conv = Conv(module.in_channels, module.out_channels, *geometry, height, width)
        found[conv] = found.get(conv, 0) + 1

    with torch.device("meta"):
        for name in names:
            model: nn.Module = getattr(fr.models, name)()
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(note)
            with fr.nn.stock():
                model(torch.empty(2, 3, size, size))
    return [replace(conv, count=count) for conv, count in found.items()]


class Operands:
    """The tensors of one convolution, channels_last, and the calls on them."""

    def __init__(self, conv: Conv, batch: int, dtype: torch.dtype, where: torch.device) -> None:
        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, device=where).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        self.conv = conv
        self.x = draw(batch, conv.inputs, conv.height, conv.width)
        self.weight = draw(conv.outputs, conv.inputs, conv.kernel, conv.kernel) / (conv.inputs * conv.kernel**2) ** 0.5
        self.dy = draw(batch, conv.outputs, *conv.output_size)
        self.scale, self.bias = (draw(1, conv.inputs, 1, 1) * 0.1 for _ in range(2))

    def forward(self) -> Tensor:
        """y."""
        return self._convolve(self.x)

    def forward_of_activated(self) -> Tensor:
        """y of relu(x * scale + bias)."""
        return self._convolve(torch.relu(self.x * self.scale + self.bias))

    def _convolve(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, None, self.conv.stride, self.conv.padding)

    def dgrad(self) -> Tensor:
        """dx."""
        return self._backward(self.x, [True, False, False])[0]

    def wgrad(self) -> Tensor:
        """dweight."""
        return self._backward(self.x, [False, True, False])[1]

    def wgrad_of_activated(self) -> Tensor:
        """dweight with relu(x * scale + bias) as input."""
        return self._backward(torch.relu(self.x * self.scale + self.bias), [False, True, False])[1]

    def _backward(self, x: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        stride, padding = [self.conv.stride] * 2, [self.conv.padding] * 2
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            self.dy, x, self.weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        return result

    def plain(self) -> dict[str, Callable[[], Tensor]]:
        """The three passes as PyTorch calls cuDNN for them."""
        return {"forward": self.forward, "dgrad": self.dgrad, "wgrad": self.wgrad}
