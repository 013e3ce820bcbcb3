"""AdamW on blocks of rows in PyTorch: the reference on any device.

Three passes over rows, each in blocks that fit in a core's second-level cache:
`update`  the step on the rows that have gradients;
`sweep`   the step on every row of the table;
`replay`  the steps without gradient that rows have missed: all of them, or at most a limit (fast_replay.py).

The order of operations is that of torch.optim.AdamW(foreach=False) (torch/optim/adam.py, _single_tensor_adam):
p *= 1 - lr*wd; m.lerp_(g, 1-b1); v = v*b2 + (1-b2)*g*g; p += -size * m / (sqrt(v)/root + eps). Without a
gradient, m.lerp_(0) differs from m*b1 in the last bit, and v*b2 + 0 equals v*b2.

Shapes: R table rows, D width, X = D or 1 (row-wise second moment), U rows given, B rows of a block.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import Tensor

from kernels.row_adamw import fast_replay
from kernels.row_adamw.history import History
from kernels.row_adamw.rows import Blocks, State, decay_factors, decay_moments, even

__all__ = ["Blocks", "replay", "sweep", "update"]


def update(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """Apply the latest step of `history` to rows that have gradients, in place.

    Their values must be at the previous step; moments that are further behind decay first.

    Args:
        state: The table, its moments and the steps of its rows.
        blocks: Scratch memory.
        rows_U: The rows, int64, ascending.
        grads_UD: Their gradients.
        history: Learning rates and bias corrections of all steps.
    """
    behind_U = history.step - 1 - state.moment(rows_U)
    factors_U2 = decay_factors(behind_U, history, state.mean_RD) if bool((behind_U > 0).any()) else None
    state.last_R[rows_U] = history.step
    state.moment_R[rows_U] = history.step
    state.touched_R[rows_U] = True
    for low, high in even(len(rows_U), blocks.rows):
        parts = blocks.gather(rows_U[low:high])
        if factors_U2 is not None:
            decay_moments(parts[1], parts[2], factors_U2[low:high])
        _gradient_step(*parts, grads_UD[low:high], blocks.root(high - low), history)
        blocks.scatter(rows_U[low:high], *parts, history.step)


def sweep(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """Apply the latest step of `history` to every row, in place; rows not in rows_U (ascending) have no gradient.

    Gradients are expanded one block at a time. `last_R` is not updated.

    Args:
        state: The table, its moments and the steps of its rows.
        blocks: Scratch memory.
        rows_U: The rows with gradients, int64, ascending.
        grads_UD: Their gradients.
        history: Learning rates and bias corrections of all steps.
    """
    state.touched_R[rows_U] = True
    table_rows, width = state.mean_RD.shape
    bounds = torch.tensor([*range(0, table_rows, blocks.rows), table_rows], device=rows_U.device)
    cuts = torch.searchsorted(rows_U, bounds).tolist()
    zeros_BD = state.mean_RD.new_zeros(blocks.rows, width)
    for start, low, high in zip(bounds.tolist(), cuts[:-1], cuts[1:], strict=False):
        stored_BD, m_BD, v_BX = (tensor[start : start + blocks.rows] for tensor in state.tensors)
        count, within_U = len(stored_BD), rows_U[low:high] - start
        g_BD = grads_UD[low:high]
        if high - low < count:
            g_BD = zeros_BD[:count].index_copy_(0, within_U, g_BD)
        p_BD = stored_BD.to(blocks.wide)
        _gradient_step(p_BD, m_BD, v_BX, g_BD, blocks.root(count), history)
        if p_BD is not stored_BD:
            stored_BD.copy_(state.rounded(p_BD, torch.arange(start, start + count, device=rows_U.device), history.step))
        if high - low < count:
            zeros_BD.index_fill_(0, within_U, 0.0)


def _gradient_step(p_BD: Tensor, m_BD: Tensor, v_BX: Tensor, g_BD: Tensor, root_BX: Tensor, history: History) -> None:
    """Apply the latest step in place, in torch's operation order; a one-column v takes the row's mean square."""
    hyper, at = history.hyper, history.at(history.step)
    if hyper.weight_decay != 0:
        p_BD.mul_(history.decay[at])
    m_BD.lerp_(g_BD, 1 - hyper.beta1)
    if v_BX.shape == g_BD.shape:
        v_BX.mul_(hyper.beta2).addcmul_(g_BD, g_BD, value=1 - hyper.beta2)
    else:
        v_BX.mul_(hyper.beta2).add_(g_BD.square().mean(1, keepdim=True), alpha=1 - hyper.beta2)
    _descend(p_BD, m_BD, v_BX, root_BX, history, at)


def _descend(p_BD: Tensor, m_BD: Tensor, v_BX: Tensor, root_BX: Tensor, history: History, at: int) -> None:
    torch.sqrt(v_BX, out=root_BX)
    if history.root[at] != 1.0:
        root_BX.div_(history.root[at])
    root_BX.add_(history.hyper.eps)
    p_BD.addcdiv_(m_BD, root_BX, value=-history.size[at])


def replay(state: State, blocks: Blocks, rows_U: Tensor, history: History, limit: int | None, moments: bool) -> None:
    """Bring rows to the latest step, as if they had had zero gradients since their last one.

    Args:
        state: The table and its moments.
        blocks: Scratch memory.
        rows_U: Unique int64 rows.
        history: The steps so far.
        limit: Most steps replayed per row (fast_replay.py); None: every step, in torch's operations.
        moments: Bring the moments up to date too, instead of leaving that to `update`.
    """
    if not moments:
        rows_U = rows_U[state.last(rows_U) < history.step]
    last_U = state.last(rows_U)
    state.last_R[rows_U] = history.step
    touched_U = state.touched_R[rows_U]
    if history.hyper.weight_decay != 0:
        _decay(state, rows_U[~touched_U], last_U[~touched_U], history, exact=limit is None)
    last_U, order_U = last_U[touched_U].sort(stable=True)
    rows_U = rows_U[touched_U][order_U]
    if limit is not None:
        fast_replay.replay(state, blocks, rows_U, last_U, history, limit, moments)
        return
    state.moment_R[rows_U] = history.step
    lasts = last_U.tolist()
    for low, high in even(len(lasts), blocks.rows):
        parts = blocks.gather(rows_U[low:high])
        _every_step(*parts, blocks.root(high - low), lasts[low:high], history)
        blocks.scatter(rows_U[low:high], *parts, history.step)


def _decay(state: State, rows_U: Tensor, last_U: Tensor, history: History, exact: bool) -> None:
    """Replay rows that never had a gradient: weight decay alone; `exact`: step by step."""
    for last in last_U.unique().tolist():
        rows_G = rows_U[last_U == last]
        values_GD = state.values_RD[rows_G].to(state.mean_RD.dtype)
        if exact:
            for decay in history.decay[history.at(last) + 1 :]:
                values_GD.mul_(decay)
        else:
            values_GD.mul_(math.exp(history.log_decay[-1] - history.log_decay[history.at(last)]))
        state.write(rows_G, values_GD, history.step)


def _every_step(p_BD: Tensor, m_BD: Tensor, v_BX: Tensor, root_BX: Tensor, lasts: list[int], history: History) -> None:
    """Replay every missed step of rows sorted by their last one; at step s the rows with last < s are a prefix."""
    hyper, zero = history.hyper, m_BD.new_zeros(())
    active, parts = 0, (p_BD, m_BD, v_BX, root_BX)
    for step in range(lasts[0] + 1, history.step + 1):
        count = len(lasts) if active == len(lasts) else bisect_right(lasts, step - 1)
        if count != active:
            active, parts = count, (p_BD[:count], m_BD[:count], v_BX[:count], root_BX[:count])
        p, m, v, root = parts
        at = history.at(step)
        if hyper.weight_decay != 0:
            p.mul_(history.decay[at])
        m.lerp_(zero, 1 - hyper.beta1)
        v.mul_(hyper.beta2)
        _descend(p, m, v, root, history, at)
