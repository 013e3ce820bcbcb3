"""Row-wise AdamW in Triton: a step on blocks of rows, and a replay in which every row loops over its missed steps.

The same three passes as reference.py, with the same meaning. Differences: operations may be contracted (fused
multiply-add), so values agree with dense AdamW within a few ulps and not bit for bit; missed steps are always taken
one by one, in torch's operation order, up to the limit; and a replay always brings the moments up to date.

What changes from step to step reaches a kernel as a tensor, or as an integer that it is not specialized on, so that
nothing is compiled in the middle of a run. No value is read back from the device.

Checked in Triton's interpreter and by compiling; not run on a device yet.

Shapes: R table rows, D width, X = D or 1, L rows, P places for rows, T steps remembered; B blocks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.embedding_bag.gradients import Placed
from kernels.row_adamw.history import History
from kernels.row_adamw.noise import MULTIPLIERS
from kernels.row_adamw.rows import State

__all__ = ["READS_IN_PLACE", "Blocks", "replay", "sweep", "update"]

READS_IN_PLACE = True
"""`update` and `sweep` take gradients as RowGradients.placed gives them, and `replay` takes rows that repeat."""
OUTDATED = "a row has a gradient but was not read since the last step"
EVERY = (1 << 31) - 1
"""A limit on replayed steps that no row reaches."""
ELEMENTS = 512
"""Of a warp: 16 values of every array per thread."""
ROWS = 32
"""Of a program, at most: one per thread of a warp. More rows of few values need more addresses than registers."""
REGISTERS = 128
"""Of a thread, at most, in fp32. Without a limit, a step on wide rows gets fewer, and a few of them are spilled."""


class Blocks:
    """The scalars of the latest steps on the device, copied there once per step.

    Rows are updated where they are. `is_current` becomes 0 when an update finds a row that has missed a step.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.is_current = torch.ones((), dtype=torch.int32, device=state.last_R.device)
        self._of: tuple[int, int] | None = None
        self._parts: tuple[Tensor, ...] = ()

    def scalars(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """Return the constants of `_step_kernel`, those of `_replay_kernel`, and its steps [4 * T]."""
        if self._of != (history.start, history.step):
            self._of = (history.start, history.step)
            hyper, at, factors = history.hyper, history.at(history.step), history.log2_factors
            step = (history.decay[at], history.size[at], history.root[at], hyper.eps, 1 - hyper.beta1, hyper.beta2)
            constants = ((*step, 1 - hyper.beta2, *factors), (1 - hyper.beta1, hyper.beta2, hyper.eps, *factors))
            size_root_log_decay = history.table[:, : len(history.size)]
            log_decays = history.log_decay[-1] - size_root_log_decay[2]
            steps = torch.cat((*size_root_log_decay[:2], size_root_log_decay[3], log_decays))
            parts = (*(torch.tensor(part, dtype=torch.float64) for part in constants), steps)
            copied = _on_device(torch.cat(parts), self.state.mean_RD)
            self._parts = copied.split([len(part) for part in parts])
        of_step, of_replay, steps = self._parts
        return of_step, of_replay, steps


@triton.jit
def _mixed(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    # See noise.mixed.
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * FIRST
    x = (x ^ (x >> 15)) * SECOND
    return x ^ (x >> 16)


@triton.jit
def _store(
    values, places, p, inside, rows, columns, key, STOCHASTIC: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    if STOCHASTIC:
        noise = _mixed(_mixed(rows ^ key, FIRST, SECOND) ^ _mixed(columns, FIRST, SECOND), FIRST, SECOND)
        below = noise.to(tl.int32, bitcast=True) & 0xFFFF
        p = ((p.to(tl.int32, bitcast=True) + below) & -65536).to(tl.float32, bitcast=True)
    tl.store(values + places, p, mask=inside)


@triton.jit(do_not_specialize=["count", "table_rows", "now", "floor", "key"])
def _step_kernel(
    values,
    mean,
    square,
    touched,
    last,
    moment,
    grads,
    rows,
    slots,
    is_read,
    constants,
    scale,
    key,
    first_column,
    is_current,
    count,
    table_rows,
    now,
    floor,
    width,
    SWEEP: tl.constexpr,
    ROW_WISE: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The rows [count] (R: none), or without them every row (only those flagged by is_read, unless SWEEP). A row's
    # gradient is at its slot [R] (-1: zero), or with `rows` at its place among them, times `scale`.
    # constants: decay, size, root, eps, w1, b2, w2, log2 of both factors. In a tensor: arguments would be float32.
    nth = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = nth < count
    row = nth
    slot = nth
    if rows is not None:
        row = tl.load(rows + nth, mask=valid, other=0)
        valid = valid & (row < table_rows)
    has_gradient = valid
    if slots is not None:
        slot = tl.load(slots + nth, mask=valid, other=-1).to(tl.int64)
        has_gradient = valid & (slot >= 0)
    if is_read is not None:
        has_gradient = valid & (tl.load(is_read + nth, mask=valid, other=0) != 0)
    if not SWEEP:
        valid = has_gradient
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = valid[:, None] & (columns < width)
    places = row[:, None] * width + columns
    g = tl.load(grads + slot[:, None] * width + columns, mask=inside & has_gradient[:, None], other=0.0)
    if scale is not None:
        g = g * tl.load(scale)
    p = tl.load(values + places, mask=inside, other=0.0).to(WIDE)
    m = tl.load(mean + places, mask=inside, other=0.0)
    if ROW_WISE:
        v = tl.load(square + row, mask=valid, other=0.0)[:, None]
        g2 = (tl.sum(g * g, 1) / width)[:, None]
    else:
        v = tl.load(square + places, mask=inside, other=0.0)
        g2 = g * g
    if not SWEEP:
        missed = (now - 1 - tl.maximum(tl.load(moment + row, mask=valid, other=now - 1), floor)).to(WIDE)[:, None]
        m = m * tl.exp2(missed * tl.load(constants + 7))
        v = v * tl.exp2(missed * tl.load(constants + 8))
    m = m + tl.load(constants + 4) * (g - m)
    v = v * tl.load(constants + 5) + tl.load(constants + 6) * g2
    if DECAYS:
        p = p * tl.load(constants)
    p = p - tl.load(constants + 1) * m / (tl.sqrt(v) / tl.load(constants + 2) + tl.load(constants + 3))
    _store(values, places, p, inside, row[:, None], first_column + columns, key, STOCHASTIC, FIRST, SECOND)
    tl.store(mean + places, m, mask=inside)
    if ROW_WISE:
        tl.store(square + row[:, None], v, mask=valid[:, None])
    else:
        tl.store(square + places, v, mask=inside)
    tl.store(touched + row, 1, mask=has_gradient)
    if not SWEEP:
        before = tl.maximum(tl.load(last + row, mask=valid, other=now - 1), floor)
        tl.store(is_current + row * 0, 0, mask=valid & (before < now - 1))
        tl.store(last + row, now, mask=valid)
        tl.store(moment + row, now, mask=valid)


@triton.jit(do_not_specialize=["table_rows", "now", "floor", "start", "limit", "length", "key"])
def _replay_kernel(
    values,
    mean,
    square,
    touched,
    rows,
    last,
    moment,
    steps,
    constants,
    key,
    first_column,
    table_rows,
    now,
    floor,
    start,
    limit,
    length,
    width,
    ROW_WISE: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One of the rows, ascending with repeats (R and more: none), or without them one of all rows, moments included.
    # steps [4, length]: size, root, decay, log of the decays after a step; constants: w1, b2, eps, log2 of factors.
    program = tl.program_id(0).to(tl.int64)
    row = program
    repeats = 0
    if rows is not None:
        row = tl.load(rows + program).to(tl.int64)
        before = tl.load(rows + program - 1, mask=program > 0, other=-1).to(tl.int64)
        repeats = tl.where((before == row) | (row >= table_rows), 1, 0)
        row = tl.where(repeats != 0, 0, row)
    done = tl.maximum(tl.load(last + row), floor)
    settled = tl.maximum(tl.load(moment + row), floor)
    is_touched = tl.load(touched + row) != 0
    behind = done < now
    if rows is None:
        behind = behind | (is_touched & (settled < now))
    if behind & (repeats == 0):
        columns = tl.arange(0, BLOCK_D)
        inside = columns < width
        places = row * width + columns
        p = tl.load(values + places, mask=inside, other=0.0).to(WIDE)
        if is_touched:
            log2_factor1 = tl.load(constants + 3)
            log2_factor2 = tl.load(constants + 4)
            late = (done - settled).to(WIDE)
            m = tl.load(mean + places, mask=inside, other=0.0) * tl.exp2(late * log2_factor1)
            v = tl.load(square + row) if ROW_WISE else tl.load(square + places, mask=inside, other=0.0)
            v = v * tl.exp2(late * log2_factor2)
            count = tl.minimum(now - done, limit)
            nth = 0
            while nth < count:
                at = done - start + 1 + nth
                if DECAYS:
                    p = p * tl.load(steps + 2 * length + at)
                m = m - tl.load(constants) * m
                v = v * tl.load(constants + 1)
                root = tl.sqrt(v) / tl.load(steps + length + at) + tl.load(constants + 2)
                p = p - tl.load(steps + at) * m / root
                nth += 1
            left = (now - done - count).to(WIDE)
            m = m * tl.exp2(left * log2_factor1)
            v = v * tl.exp2(left * log2_factor2)
            if DECAYS:
                p = p * tl.exp(tl.load(steps + 3 * length + done - start + count))
            tl.store(mean + places, m, mask=inside)
            if ROW_WISE:
                tl.store(square + row, v)
            else:
                tl.store(square + places, v, mask=inside)
        else:
            if DECAYS:
                p = p * tl.exp(tl.load(steps + 3 * length + done - start))
        _store(values, places, p, inside, row, first_column + columns, key, STOCHASTIC, FIRST, SECOND)
        tl.store(last + row, now)
        tl.store(moment + row, now)


def update(state: State, blocks: Blocks, placed: Placed, history: History) -> None:
    """See reference.update; gradients are read where they are, as RowGradients.placed gives them."""
    count = len(state.last_R) if placed.rows_P is None else len(placed.rows_P)
    _step(state, blocks, placed, history, count, blocks.is_current)
    if blocks.is_current.is_cuda:
        torch._assert_async(blocks.is_current, OUTDATED)  # an error of a later call: the host does not wait
    else:
        assert blocks.is_current, OUTDATED


def sweep(state: State, blocks: Blocks, placed: Placed, history: History) -> None:
    """See reference.sweep; finds the gradients of few rows through a map of 4 bytes per row."""
    slots_R = None
    if placed.rows_P is not None:
        places_P = torch.arange(len(placed.rows_P), dtype=torch.int32, device=placed.rows_P.device)
        room_R = state.last_R.new_full((len(state.last_R) + 1,), -1)  # unused places have the row R
        slots_R = room_R.index_copy_(0, placed.rows_P, places_P)[:-1]
    _step(state, blocks, placed._replace(rows_P=None), history, len(state.last_R), slots_R=slots_R)


def _step(
    state: State,
    blocks: Blocks,
    placed: Placed,
    history: History,
    count: int,
    is_current: Tensor | None = None,
    slots_R: Tensor | None = None,
) -> None:
    """Take one step on `count` rows: those that have gradients, clearing `is_current` if one is behind, or all."""
    width, block = state.mean_RD.shape[1], triton.next_power_of_2(state.mean_RD.shape[1])
    block_rows = max(1, min(ROWS, ELEMENTS // 2 // block))
    if count:
        _step_kernel[(triton.cdiv(count, block_rows),)](
            *state.tensors,
            state.touched_R,
            state.last_R,
            state.moment_R,
            placed.sums.contiguous(),
            placed.rows_P,
            slots_R,
            placed.is_read_R,
            blocks.scalars(history)[0],
            placed.scale,
            *_noise(state, history),
            is_current,
            count,
            len(state.last_R),
            history.step,
            state.floor,
            width,
            SWEEP=is_current is None,
            DECAYS=history.hyper.weight_decay != 0,
            BLOCK_R=block_rows,
            num_warps=max(1, min(16, block_rows * block // ELEMENTS)),
            maxnreg=None if state.mean_RD.dtype == torch.float64 else REGISTERS,
            **_constants(state),
        )


def replay(state: State, blocks: Blocks, rows_L: Tensor | None, history: History, limit: int | None) -> None:
    """See reference.replay; moments are brought up to date in any case.

    Args:
        state: The table and its moments.
        blocks: The scalars of the steps.
        rows_L: Rows, ascending; they may repeat. None: all rows, those that are behind in their moments alone too.
        history: The steps so far.
        limit: Most steps replayed per row; None: every step.
    """
    width, count = state.mean_RD.shape[1], len(state.last_R) if rows_L is None else len(rows_L)
    _, of_replay, steps = blocks.scalars(history)
    if count:
        _replay_kernel[(count,)](
            *state.tensors,
            state.touched_R,
            rows_L,
            state.last_R,
            state.moment_R,
            steps,
            of_replay,
            *_noise(state, history),
            len(state.last_R),
            history.step,
            state.floor,
            history.start,
            EVERY if limit is None else limit,
            len(steps) // 4,
            width,
            DECAYS=history.hyper.weight_decay != 0,
            num_warps=max(1, min(16, triton.next_power_of_2(width) // ELEMENTS)),
            **_constants(state),
        )


def _constants(state: State) -> dict[str, object]:
    width = state.mean_RD.shape[1]
    return {
        "ROW_WISE": state.square_RX.shape[1] != width,
        "STOCHASTIC": state.noise is not None,
        "FIRST": MULTIPLIERS[0],
        "SECOND": MULTIPLIERS[1],
        "WIDE": tl.float64 if state.mean_RD.dtype == torch.float64 else tl.float32,
        "BLOCK_D": triton.next_power_of_2(width),
    }


def _on_device(values: Tensor, like: Tensor) -> Tensor:
    """Return values from the host in the dtype and on the device of `like`; from pinned memory, so that the host goes
    on."""
    values = values.to(like.dtype)
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _noise(state: State, history: History) -> tuple[int, int]:
    """Return the key of the latest step's stochastic rounding, and the first column; zeros where it is off."""
    return (0, 0) if state.noise is None else (state.noise.key(history.step), state.noise.first_column)
