"""Distributions of initial values. Elements are independent: any part of a tensor can be drawn separately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Distribution(Protocol):
    """Independent elements of one law. A baseline may have its own."""

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`, a block of a parameter of any shape and place."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Normal with mean zero and standard deviation `std`."""

    std: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float
    high: float

    def fill_(self, x: Tensor, generator: torch.Generator) -> None:
        """Fill `x`."""
        x.uniform_(self.low, self.high, generator=generator)


def xavier_uniform(fan_in: int, fan_out: int) -> Uniform:
    """Return the distribution of torch.nn.init.xavier_uniform_ (Glorot and Bengio 2010, eq. 16)."""
    bound: float = 3.0**0.5 * (2.0 / (fan_in + fan_out)) ** 0.5
    return Uniform(-bound, bound)
