"""Replay of missed AdamW steps with square roots and powers of the betas taken once per gap.

Without gradients m_s = m b1^(s-last) and v_s = v b2^(s-last), so with E_s = the product of weight decays after s
p_now = p E_last - sum over s of size_s E_s m_s / (sqrt(v_s) / root_s + eps): two operations per step and row, one of
them a division, instead of torch's seven with two divisions and a root. The result differs from torch's by a few
roundings of p and of each update. The sum has no closed form, because eps matters for small v.

Shapes: D width, X = D or 1, U rows, B rows of a block.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.row_adamw.history import History
from kernels.row_adamw.rows import Blocks, State, column, decay_moments, even, kept, powers

NARROW = 64
"""Largest spread of last steps in a block; bounds beta^-spread."""


def replay(
    state: State, blocks: Blocks, rows_U: Tensor, last_U: Tensor, history: History, limit: int, moments: bool
) -> None:
    """See reference.replay; for touched rows sorted by last_U; at most `limit` updates, then decay alone."""
    _settle(state, blocks, rows_U, last_U, history)
    kept_U2 = kept(history.step - last_U, history, state.mean_RD) if moments else None
    lasts, last_U = last_U.tolist(), last_U.cpu()
    for low, high in _cuts(lasts, blocks.rows, history.step, limit):
        p_BD, m_BD, v_BX = blocks.gather(rows_U[low:high])
        r_BX, root_BX = (v_BX.sqrt() if moments else v_BX.sqrt_()), blocks.root(high - low)
        _weight_decay(p_BD, last_U[low:high], history)
        if lasts[low] <= history.step - limit:
            _subtract_by_age(p_BD, m_BD, r_BX, root_BX, last_U[low:high], history, limit)
        else:
            _subtract_by_step(p_BD, m_BD, r_BX, root_BX, lasts[low:high], history)
        state.write(rows_U[low:high], p_BD)
        if kept_U2 is not None:
            decay_moments(m_BD, v_BX, kept_U2[low:high])
            blocks.scatter_moments(rows_U[low:high], m_BD, v_BX)
    if moments:
        state.moment_R[rows_U] = history.step


def _settle(state: State, blocks: Blocks, rows_U: Tensor, last_U: Tensor, history: History) -> None:
    """Bring moments up to the step of the values where a row was read and then had no gradient."""
    behind_U = last_U - state.moment(rows_U)
    late = behind_U > 0
    if not bool(late.any()):
        return
    rows_U, kept_U2 = rows_U[late], kept(behind_U[late], history, state.mean_RD)
    for low, high in even(len(rows_U), blocks.rows):
        _, m_BD, v_BX = blocks.gather(rows_U[low:high])
        decay_moments(m_BD, v_BX, kept_U2[low:high])
        blocks.scatter_moments(rows_U[low:high], m_BD, v_BX)
    state.moment_R[rows_U] = last_U[late].int()


def _cuts(lasts: list[int], rows: int, now: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks.

    Rows that missed `limit` steps or more have blocks of their own, and so have rows with the same last step if they
    fill one; the last steps in other blocks differ by at most NARROW.
    """
    low = 0
    cut_off = bisect_right(lasts, now - limit)
    while low < len(lasts):
        high = min(low + rows, cut_off if low < cut_off else bisect_right(lasts, lasts[low] + NARROW))
        same = bisect_right(lasts, lasts[low], low, high)
        high = same if low >= cut_off and 2 * (same - low) >= rows else high
        yield low, high
        low = high


def _weight_decay(p_BD: Tensor, last_B: Tensor, history: History) -> None:
    if history.hyper.weight_decay == 0:
        return
    if last_B[0] == last_B[-1]:
        p_BD.mul_(math.exp(history.log_decay[-1] - history.log_decay[history.at(int(last_B[0]))]))
    else:
        p_BD.mul_(column((history.log_decay[-1] - history.table[2, last_B - history.start]).exp(), p_BD))


def _subtract_by_step(
    p_BD: Tensor, m_BD: Tensor, r_BX: Tensor, root_BX: Tensor, lasts: list[int], history: History
) -> None:
    """Subtract the missed updates, absolute step by absolute step: at step s the rows with last < s, a prefix.

    Moments are first written as of the newest last step of the block, so that one scalar serves all rows.
    """
    newest = lasts[-1]
    if lasts[0] != newest:
        ahead_B = newest - torch.tensor(lasts)
        m_BD = m_BD * column(powers(history.kept1, ahead_B), m_BD)
        r_BX.mul_(column(powers(history.kept2, ahead_B / 2), r_BX))
    eps = m_BD.new_tensor(history.hyper.eps)
    active, parts = 0, (p_BD, m_BD, r_BX, root_BX)
    for step in range(lasts[0] + 1, history.step + 1):
        count = len(lasts) if active == len(lasts) else bisect_right(lasts, step - 1)
        if count != active:
            active, parts = count, (p_BD[:count], m_BD[:count], r_BX[:count], root_BX[:count])
        p, m, r, root = parts
        at = history.at(step)
        size = history.size[at] * math.exp(history.log_decay[-1] - history.log_decay[at])
        torch.add(eps, r, alpha=history.kept2 ** ((step - newest) / 2) / history.root[at], out=root)
        p.addcdiv_(m, root, value=-size * history.kept1 ** (step - newest))


def _subtract_by_age(
    p_BD: Tensor, m_BD: Tensor, r_BX: Tensor, root_BX: Tensor, last_B: Tensor, history: History, limit: int
) -> None:
    """Subtract the first `limit` missed updates of rows that missed at least as many, by each row's own age.

    Their last steps may lie far apart, so what is a scalar in `_subtract_by_step` is a column here.
    """
    newest = history.log_decay[-1]
    for age in range(1, limit + 1):
        size_B, root_B, log_decay_B = history.table[:3, last_B - history.start + age]
        size_B = size_B * (newest - log_decay_B).exp() * history.kept1**age
        torch.mul(r_BX, column(history.kept2 ** (age / 2) / root_B, r_BX), out=root_BX).add_(history.hyper.eps)
        p_BD.addcdiv_(m_BD * column(size_B, m_BD), root_BX, value=-1.0)
