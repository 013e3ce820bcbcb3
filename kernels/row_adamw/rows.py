"""The state of a row-wise AdamW, and scratch memory for copies of a block of its rows.

Shapes: R table rows, D width, X = D or 1 (row-wise second moment), U rows, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.row_adamw.history import History
from kernels.row_adamw.noise import Noise

BLOCK_ELEMENTS = 1 << 15
"""Values per block: the rows of three float32 arrays and their copies fill half of a 2 MiB second-level cache, so
that rows are still there when they are written back (scattered writes that miss cost five times as much)."""


@dataclass
class State:
    """Parameters and moments of a table.

    values_RD: the table itself or its float32 master copy; mean_RD and square_RX float32 (float64 for a float64
    table); last_R and moment_R int32: the steps up to which a row's values and moments are current (moments may be
    behind: `update` catches up); touched_R bool: rows that ever had a gradient (others have zero moments).
    floor: every row is current up to at least this step. noise: if given, values are rounded stochastically.
    """

    values_RD: Tensor
    mean_RD: Tensor
    square_RX: Tensor
    last_R: Tensor
    moment_R: Tensor
    touched_R: Tensor
    floor: int = 0
    noise: Noise | None = None

    def last(self, rows_U: Tensor) -> Tensor:
        """Return the step up to which the rows' values are current."""
        return self.last_R[rows_U].clamp(min=self.floor)

    def moment(self, rows_U: Tensor) -> Tensor:
        """Return the step up to which the rows' moments are current."""
        return self.moment_R[rows_U].clamp(min=self.floor)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, mean, square."""
        return self.values_RD, self.mean_RD, self.square_RX

    def rounded(self, values_BD: Tensor, rows_B: Tensor, step: int) -> Tensor:
        """Return the values of rows after a step, rounded to the table's dtype.

        They are rounded to nearest or, with `noise`, stochastically and without bias (bfloat16).

        Args:
            values_BD: The values in the dtype of the moments.
            rows_B: Their rows.
            step: The step, which seeds the noise.
        """
        if self.noise is None:
            return values_BD.to(self.values_RD.dtype)
        below_BD = self.noise.bits(rows_B, values_BD.shape[1], step)
        rounded_BD = values_BD.view(torch.int32).add(below_BD).bitwise_and_(-(1 << 16))
        return rounded_BD.view(torch.float32).to(self.values_RD.dtype)

    def write(self, rows_B: Tensor, values_BD: Tensor, step: int) -> None:
        """Store the values of some rows after a step."""
        self.values_RD.index_copy_(0, rows_B, self.rounded(values_BD, rows_B, step))


class Blocks:
    """Scratch memory for the rows of one block, gathered from a State and written back to it."""

    def __init__(self, state: State) -> None:
        self.state, self.wide = state, state.mean_RD.dtype
        self.rows = max(1, min(len(state.last_R), BLOCK_ELEMENTS // state.values_RD.shape[1]))
        self._scratch = [tensor.new_empty(self.rows, tensor.shape[1], dtype=self.wide) for tensor in state.tensors]
        self._root_BX = torch.empty_like(self._scratch[2])

    def root(self, count: int) -> Tensor:
        """Return scratch memory for the denominators of `count` rows."""
        return self._root_BX[:count]

    def gather(self, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of the rows' values, mean and square."""
        p_BD, m_BD, v_BX = (scratch[: len(rows_B)] for scratch in self._scratch)
        if self.state.values_RD.dtype == self.wide:
            torch.index_select(self.state.values_RD, 0, rows_B, out=p_BD)
        else:
            p_BD.copy_(self.state.values_RD.index_select(0, rows_B))
        torch.index_select(self.state.mean_RD, 0, rows_B, out=m_BD)
        torch.index_select(self.state.square_RX, 0, rows_B, out=v_BX)
        return p_BD, m_BD, v_BX

    def scatter(self, rows_B: Tensor, p_BD: Tensor, m_BD: Tensor, v_BX: Tensor, step: int) -> None:
        """Write back the copies after a step.

        Args:
            rows_B: The rows.
            p_BD: Their values.
            m_BD: Their mean.
            v_BX: Their square.
            step: The step.
        """
        self.state.write(rows_B, p_BD, step)
        self.scatter_moments(rows_B, m_BD, v_BX)

    def scatter_moments(self, rows_B: Tensor, m_BD: Tensor, v_BX: Tensor) -> None:
        """Write the copies of the moments back."""
        self.state.mean_RD.index_copy_(0, rows_B, m_BD)
        self.state.square_RX.index_copy_(0, rows_B, v_BX)


def even(count: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of `rows` rows."""
    return ((low, min(low + rows, count)) for low in range(0, count, rows))


def decay_moments(m_BD: Tensor, v_BX: Tensor, factors_B2: Tensor) -> None:
    """Decay moments over steps without gradient, in place; factors_B2 as returned by `decay_factors`."""
    m_BD.mul_(factors_B2[:, :1])
    v_BX.mul_(factors_B2[:, 1:])


def decay_factors(missed_U: Tensor, history: History, like: Tensor) -> Tensor:
    """Return the factors that steps without a gradient apply to both moments, [U, 2].

    Args:
        missed_U: Number of such steps of each row.
        history: The steps taken.
        like: A tensor whose dtype and device the factors have.
    """
    steps = torch.arange(int(missed_U.max()) + 1 if len(missed_U) else 1, device=missed_U.device)
    table_2T = torch.stack((powers(history.factor1, steps), powers(history.factor2, steps)), 1)
    return table_2T.to(like.device, like.dtype)[missed_U.to(like.device)]


def powers(base: float, exponent_B: Tensor) -> Tensor:
    """Return base ** exponent in float64."""
    return torch.pow(base, exponent_B.double())


def column(values_B: Tensor, like: Tensor) -> Tensor:
    """Return a factor per row, in the dtype and on the device of the rows."""
    return values_B.to(like.device, like.dtype).unsqueeze(1)
