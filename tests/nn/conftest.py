"""Fixtures of the blocks' tests: the fused path even without the extension, and a count of the operators called."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fused_resnet import ops
from fused_resnet.nn import guard
from fused_resnet.ops import _block

OPERATORS = (
    "add_act",
    "batch_norm_act",
    "batch_norm_act_conv",
    "batch_norm_act_max_pool",
    "conv2d",
    "dual_batch_norm_act",
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets units take the fused path where the extension is missing too: the operators then run in stock PyTorch."""
    monkeypatch.setattr(guard, "_UNAVAILABLE", None)


@pytest.fixture
def calls(fused: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator of `fused_resnet.ops` has been called, and the whole block's: never by a stock unit."""
    counter: Counter[str] = Counter()

    def counted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operator)
        def call(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return operator(*args, **kwargs)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    monkeypatch.setattr(_block, "residual_block", counted("residual_block", _block.residual_block))
    return counter
