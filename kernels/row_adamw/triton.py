"""Row-wise AdamW in Triton: a step on blocks of rows, and a replay in which every row loops over its missed steps.

The same three passes as reference.py, with the same meaning. Differences: operations may be contracted (fused
multiply-add), so values agree with dense AdamW within a few ulps and not bit for bit; missed steps are always taken
one by one, in torch's operation order, up to the limit; and a replay always brings the moments up to date.

What changes from step to step reaches a kernel as a tensor, or as an integer that it is not specialized on, so that
nothing is compiled in the middle of a run. No value is read back from the device.

Checked in Triton's interpreter and by compiling; not run on a device yet.

Shapes: R table rows, D width, X = D or 1, U rows given, T steps remembered; B blocks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.row_adamw.history import History
from kernels.row_adamw.noise import MULTIPLIERS
from kernels.row_adamw.rows import State

__all__ = ["READS_IN_PLACE", "Blocks", "replay", "sweep", "update"]

READS_IN_PLACE = True
"""`update` and `sweep` take gradients as RowGradients.placed gives them."""
EVERY = (1 << 31) - 1
"""A limit on replayed steps that no row reaches."""
ELEMENTS = 512
"""Of a warp: 16 values of every array per thread."""


class Blocks:
    """Nothing: rows are updated where they are."""

    def __init__(self, state: State) -> None:
        self.state = state


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


@triton.jit(do_not_specialize=["count", "key"])
def _step_kernel(
    values,
    mean,
    square,
    grads,
    rows,
    slots,
    behind,
    constants,
    scale,
    key,
    first_column,
    count,
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
    # The rows [count], or every row, take the gradients at slots [count] (None: in order; -1: zero), times `scale`.
    # constants: decay, size, root, eps, w1, b2, w2, log2 of both kept. In a tensor: arguments would be float32.
    nth = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    given = nth < count
    row = nth if SWEEP else tl.load(rows + nth, mask=given, other=0)
    slot = nth if slots is None else tl.load(slots + nth, mask=given, other=-1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = given[:, None] & (columns < width)
    places = row[:, None] * width + columns
    g = tl.load(grads + slot[:, None] * width + columns, mask=inside & (slot >= 0)[:, None], other=0.0)
    if scale is not None:
        g = g * tl.load(scale)
    p = tl.load(values + places, mask=inside, other=0.0).to(WIDE)
    m = tl.load(mean + places, mask=inside, other=0.0)
    if ROW_WISE:
        v = tl.load(square + row, mask=given, other=0.0)[:, None]
        g2 = (tl.sum(g * g, 1) / width)[:, None]
    else:
        v = tl.load(square + places, mask=inside, other=0.0)
        g2 = g * g
    if not SWEEP:
        missed = tl.load(behind + nth, mask=given, other=0).to(WIDE)[:, None]
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
        tl.store(square + row[:, None], v, mask=given[:, None])
    else:
        tl.store(square + places, v, mask=inside)


@triton.jit(do_not_specialize=["now", "start", "limit", "length", "key"])
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
    width,
    now,
    start,
    limit,
    length,
    ROW_WISE: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # steps [4, length]: size, root, decay, log of the decays after a step; constants: w1, b2, eps, log2 of both kept.
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + program)
    done = tl.load(last + program)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    places = row * width + columns
    p = tl.load(values + places, mask=inside, other=0.0).to(WIDE)
    if tl.load(touched + row) == 0:
        if DECAYS:
            p = p * tl.exp(tl.load(steps + 3 * length + done - start))
    else:
        kept1 = tl.load(constants + 3)
        kept2 = tl.load(constants + 4)
        late = (done - tl.load(moment + program)).to(WIDE)
        m = tl.load(mean + places, mask=inside, other=0.0) * tl.exp2(late * kept1)
        v = tl.load(square + row) if ROW_WISE else tl.load(square + places, mask=inside, other=0.0)
        v = v * tl.exp2(late * kept2)
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
        m = m * tl.exp2(left * kept1)
        v = v * tl.exp2(left * kept2)
        if DECAYS:
            p = p * tl.exp(tl.load(steps + 3 * length + done - start + count))
        tl.store(mean + places, m, mask=inside)
        if ROW_WISE:
            tl.store(square + row, v)
        else:
            tl.store(square + places, v, mask=inside)
    _store(values, places, p, inside, row, first_column + columns, key, STOCHASTIC, FIRST, SECOND)


def update(
    state: State,
    blocks: Blocks,
    rows_U: Tensor,
    sums: Tensor,
    history: History,
    slots_U: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """See reference.update; gradients are read where they are.

    Args:
        state: The table and its moments.
        blocks: Unused.
        rows_U: int64 rows that have gradients.
        sums: Their gradients, [*, D].
        history: The steps so far, the one to take included.
        slots_U: Where in `sums` a row's gradient is; None: in order.
        scale: What the gradients are multiplied by, a 0-dim tensor; None: nothing.
    """
    behind_U = history.step - 1 - state.moment(rows_U)
    state.last_R[rows_U] = history.step
    state.moment_R[rows_U] = history.step
    state.touched_R[rows_U] = True
    if rows_U.numel():
        _step(state, sums, scale, history, len(rows_U), slots_U, rows_U, behind_U)


def sweep(
    state: State,
    blocks: Blocks,
    rows_U: Tensor,
    sums: Tensor,
    history: History,
    slots_U: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """See reference.sweep; arguments as of `update`; finds gradients through a map of 4 bytes per row."""
    if slots_U is None:
        slots_U = torch.arange(len(rows_U), device=rows_U.device)
    state.touched_R[rows_U] = True
    slots_R = torch.full_like(state.last_R, -1).index_copy_(0, rows_U, slots_U.int())
    _step(state, sums, scale, history, len(state.last_R), slots_R)


def _step(
    state: State,
    sums: Tensor,
    scale: Tensor | None,
    history: History,
    count: int,
    slots: Tensor | None,
    rows: Tensor | None = None,
    behind: Tensor | None = None,
) -> None:
    """Take one step on `count` rows: those in `rows`, or without `rows` all of the table."""
    hyper, at, width = history.hyper, history.at(history.step), state.mean_RD.shape[1]
    constants = (
        history.decay[at],
        history.size[at],
        history.root[at],
        hyper.eps,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        *history.log2_kept,
    )
    block = triton.next_power_of_2(width)
    block_rows = max(1, ELEMENTS // 2 // block)
    _step_kernel[(triton.cdiv(count, block_rows),)](
        *state.tensors,
        sums.contiguous(),
        rows,
        slots,
        behind,
        _on_device(torch.tensor(constants, dtype=torch.float64), state.mean_RD),
        scale,
        *_noise(state, history),
        count,
        width,
        SWEEP=rows is None,
        DECAYS=hyper.weight_decay != 0,
        BLOCK_R=block_rows,
        num_warps=max(1, min(16, block_rows * block // ELEMENTS)),
        **_constants(state),
    )


def replay(state: State, blocks: Blocks, rows_U: Tensor, history: History, limit: int | None, moments: bool) -> None:
    """See reference.replay; moments are brought up to date in any case."""
    if not moments:
        rows_U = rows_U[state.last(rows_U) < history.step]
    last_U = state.last(rows_U)
    if not rows_U.numel():
        return
    hyper, width = history.hyper, state.mean_RD.shape[1]
    steps = history.table[:, : len(history.size)].clone()
    steps[3], steps[2] = history.log_decay[-1] - steps[2], steps[3].clone()
    constants = (1 - hyper.beta1, hyper.beta2, hyper.eps, *history.log2_kept)
    _replay_kernel[(len(rows_U),)](
        *state.tensors,
        state.touched_R,
        rows_U,
        last_U,
        state.moment(rows_U),
        _on_device(steps, state.mean_RD),
        _on_device(torch.tensor(constants, dtype=torch.float64), state.mean_RD),
        *_noise(state, history),
        width,
        history.step,
        history.start,
        EVERY if limit is None else limit,
        steps.shape[1],
        DECAYS=hyper.weight_decay != 0,
        num_warps=max(1, min(16, triton.next_power_of_2(width) // ELEMENTS)),
        **_constants(state),
    )
    state.last_R[rows_U] = history.step
    state.moment_R[rows_U] = history.step


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
