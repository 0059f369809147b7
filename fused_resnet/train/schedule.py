"""The learning rate, as a pure function of the step: nothing to save, nothing to get wrong when resuming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, step or constant.

    Attributes:
        kind: "cosine", "step" or "constant".
        lr: the highest learning rate.
        total_steps, warmup_steps: of the whole training, and of its warm-up.
        milestones: "step" only: the steps at which the rate is multiplied by `gamma`.
    """

    kind: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    milestones: Sequence[int] = ()
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        """The learning rate of step `step` (from 0).

        warm-up   lr * (step + 1) / (warmup_steps + 1)
        cosine    lr * (1 + cos(pi * t)) / 2,   t = (step - warmup_steps) / (total_steps - warmup_steps)
        step      lr * gamma^(milestones passed)
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "cosine":
            t = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.lr * (1 + math.cos(math.pi * min(t, 1.0))) / 2
        if self.kind == "step":
            return self.lr * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        return self.lr
