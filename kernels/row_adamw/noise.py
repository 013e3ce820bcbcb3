"""The noise of stochastic rounding: a hash of (seed, step, row, column).

Replicas of a table thus round a row in the same way, whenever each of them updates it, and processes that hold other
columns of the row draw other noise. Nothing has to be stored to resume.

The hash is two rounds of a 32-bit finalizer (two multiplications and three shifts, each a bijection): one of row and
column, mixed separately, and one of their exclusive or. The reference computes in int64, which holds its products.

Shapes: B rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = (1 << 32) - 1
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
STEP = 0x9E3779B9
"""Odd, so that the keys of successive steps are distinct."""


@dataclass(frozen=True)
class Noise:
    """The noise of one table's columns; `first_column` is the place of the first one in the whole table."""

    seed: int
    first_column: int = 0

    def key(self, step: int) -> int:
        """Return the key of a step, a non-negative int32."""
        return int(mixed(torch.tensor((self.seed + STEP * step) & MASK))) >> 1

    def bits(self, rows_B: Tensor, width: int, step: int) -> Tensor:
        """Return uniform integers of 16 bits, int32 [B, D], for `width` columns of some rows at a step."""
        columns_D = torch.arange(self.first_column, self.first_column + width, device=rows_B.device)
        rows_B1 = mixed(rows_B.bitwise_xor(self.key(step))).unsqueeze(1)
        return mixed(rows_B1.bitwise_xor(mixed(columns_D))).bitwise_and_(0xFFFF).int()


def mixed(x: Tensor) -> Tensor:
    """Return a bijection of 32-bit integers, held in int64."""
    first, second = MULTIPLIERS
    x = (x ^ (x >> 16)).mul_(first).bitwise_and_(MASK)
    x = (x ^ (x >> 15)).mul_(second).bitwise_and_(MASK)
    return x ^ (x >> 16)
