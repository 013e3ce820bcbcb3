"""The scalars of every AdamW step so far, for replaying the steps that a row has missed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hyper:
    """AdamW's constants (Loshchilov and Hutter 2019, algorithm 2, as in torch.optim.AdamW)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class History:
    """Scalars per step, 1-based and in double precision, computed as torch's single-tensor AdamW computes them.

    Lists indexed by `at(step)`: decay = 1 - lr * weight_decay; size = lr / (1 - beta1^step); root =
    sqrt(1 - beta2^step), 1.0 once it rounds to it; log_decay = the sum of log decay up to the step. `table`
    [4, ...] float64 holds size, root, log_decay and decay again, for lookups by many rows at once. Steps up to
    `start` are dropped, since all rows are past them.

    Powers over many steps are taken of the factors as `dtype`, that of the moments, rounds them: log_decay, and
    factor1 and factor2, what a step without gradient leaves of the moments. (The rounding of 0.9999 to float32 alone
    moves a value by 1e-6 of itself in 100 steps.)
    """

    def __init__(self, hyper: Hyper, dtype: torch.dtype, start: int = 0) -> None:
        self.hyper, self._dtype = hyper, dtype
        self.factor1, self.factor2 = 1 - self._rounded(1 - hyper.beta1), self._rounded(hyper.beta2)
        self.table = torch.zeros(4, 64, dtype=torch.float64)
        self.restart(start)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.start + len(self.size) - 1

    def at(self, step: int) -> int:
        """Return the index of a step's scalars."""
        return step - self.start

    def restart(self, start: int) -> None:
        """Drop all steps; the next one is start + 1."""
        self.start = start
        self.decay, self.size, self.root, self.log_decay = [1.0], [0.0], [1.0], [0.0]
        self.table[:, 0] = 0.0

    def append(self, lr: float) -> None:
        """Add a step at learning rate `lr`; ValueError if its weight decay would be 1 or more."""
        hyper, step = self.hyper, float(self.step + 1)
        decay = 1 - lr * hyper.weight_decay
        if decay <= 0:
            raise ValueError(f"lr * weight_decay: got {lr * hyper.weight_decay}, allowed: below 1")
        self.decay.append(decay)
        self.size.append(lr / (1 - hyper.beta1**step))
        root = (1 - hyper.beta2**step) ** 0.5
        self.root.append(1.0 if self._rounded(root) == 1.0 else root)
        self.log_decay.append(self.log_decay[-1] + math.log(self._rounded(decay)))
        if len(self.size) > self.table.shape[1]:
            self.table = torch.cat((self.table, torch.zeros_like(self.table)), 1)
        newest = (self.size[-1], self.root[-1], self.log_decay[-1], decay)
        self.table[:, len(self.size) - 1] = torch.tensor(newest, dtype=torch.float64)

    @property
    def log2_factors(self) -> tuple[float, float]:
        """Base-2 logarithms of `factor1` and `factor2`, by which the moments decay in a step without gradient."""
        return math.log2(self.factor1), math.log2(self.factor2)

    def _rounded(self, value: float) -> float:
        return torch.tensor(value, dtype=self._dtype).item()
