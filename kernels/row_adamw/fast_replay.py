"""Replay of missed AdamW steps with square roots and powers of the betas taken once per gap.

Without gradients m_s = m b1^(s-last) and v_s = v b2^(s-last), so with E_s = the product of weight decays after s
p_now = p E_last - sum over s of size_s E_s m_s / (sqrt(v_s) / root_s + eps): four operations per step and row, one of
them a division, instead of torch's seven with two divisions and a root. The result differs from torch's by a few
roundings of p and of each update. The sum has no closed form, because eps matters for small v. A row's result does not
depend on the rows that are replayed with it, so replicas of a table that read different rows stay equal.

Shapes: D width, X = D or 1, U rows, B rows of a block.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from kernels.row_adamw.history import History
from kernels.row_adamw.rows import Blocks, State, column, decay_factors, decay_moments, even


def replay(
    state: State, blocks: Blocks, rows_U: Tensor, last_U: Tensor, history: History, limit: int, moments: bool
) -> None:
    """See reference.replay; for touched rows sorted by last_U; at most `limit` updates, then decay alone."""
    _settle(state, blocks, rows_U, last_U, history)
    factors_U2 = decay_factors(history.step - last_U, history, state.mean_RD) if moments else None
    lasts, last_U = last_U.tolist(), last_U.cpu()
    for low, high in even(len(lasts), blocks.rows):
        p_BD, m_BD, v_BX = blocks.gather(rows_U[low:high])
        r_BX, root_BX = (v_BX.sqrt() if moments else v_BX.sqrt_()), blocks.root(high - low)
        _weight_decay(p_BD, last_U[low:high], history)
        _subtract(p_BD, m_BD, r_BX, root_BX, lasts[low:high], history, limit)
        state.write(rows_U[low:high], p_BD, history.step)
        if factors_U2 is not None:
            decay_moments(m_BD, v_BX, factors_U2[low:high])
            blocks.scatter_moments(rows_U[low:high], m_BD, v_BX)
    if moments:
        state.moment_R[rows_U] = history.step


def _settle(state: State, blocks: Blocks, rows_U: Tensor, last_U: Tensor, history: History) -> None:
    """Bring moments up to the step of the values where a row was read and then had no gradient."""
    behind_U = last_U - state.moment(rows_U)
    late = behind_U > 0
    if not bool(late.any()):
        return
    rows_U, factors_U2 = rows_U[late], decay_factors(behind_U[late], history, state.mean_RD)
    for low, high in even(len(rows_U), blocks.rows):
        _, m_BD, v_BX = blocks.gather(rows_U[low:high])
        decay_moments(m_BD, v_BX, factors_U2[low:high])
        blocks.scatter_moments(rows_U[low:high], m_BD, v_BX)
    state.moment_R[rows_U] = last_U[late].int()


def _weight_decay(p_BD: Tensor, last_B: Tensor, history: History) -> None:
    if history.hyper.weight_decay != 0:
        p_BD.mul_(column((history.log_decay[-1] - history.table[2, last_B - history.start]).exp(), p_BD))


def _subtract(
    p_BD: Tensor, m_BD: Tensor, r_BX: Tensor, root_BX: Tensor, lasts: list[int], history: History, limit: int
) -> None:
    """Subtract the missed updates of each row, the first `limit` at most; at each age the rows that missed it are a
    prefix."""
    last_B, newest = torch.tensor(lasts), history.log_decay[-1]
    for age in range(1, min(limit, history.step - lasts[0]) + 1):
        count = bisect_right(lasts, history.step - age)
        p, m, r, root = p_BD[:count], m_BD[:count], r_BX[:count], root_BX[:count]
        size_B, root_B, log_decay_B = history.table[:3, last_B[:count] - history.start + age]
        size_B = size_B * (newest - log_decay_B).exp() * history.factor1**age
        torch.mul(r, column(history.factor2 ** (age / 2) / root_B, r), out=root).add_(history.hyper.eps)
        p.addcdiv_(m * column(size_B, m), root, value=-1.0)
