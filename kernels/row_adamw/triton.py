"""Row-wise AdamW in Triton: one program per row, every row replaying its own missed steps in a loop.

The same three passes as reference.py, with the same meaning. Differences: operations may be contracted (fused
multiply-add), so values agree with dense AdamW within a few ulps and not bit for bit; missed steps are always taken
one by one, in torch's operation order, up to the limit; and a replay always brings the moments up to date.

Shapes: R table rows, D width, X = D or 1, U rows given; T steps remembered.
Tested under TRITON_INTERPRET=1 only. Not measured or run on a GPU yet.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.row_adamw.history import History
from kernels.row_adamw.rows import State

__all__ = ["Blocks", "replay", "sweep", "update"]

EVERY = (1 << 31) - 1
"""A limit on replayed steps that is none."""


class Blocks:
    """Nothing: rows are updated where they are."""

    def __init__(self, state: State) -> None:
        self.state = state


@triton.jit
def _store(values, places, p, inside, seed, STOCHASTIC: tl.constexpr):
    if STOCHASTIC:
        below = tl.randint(seed, places).to(tl.int32, bitcast=True) & 0xFFFF
        p = ((p.to(tl.int32, bitcast=True) + below) & -65536).to(tl.float32, bitcast=True)
    tl.store(values + places, p, mask=inside)


@triton.jit
def _step_kernel(
    values,
    mean,
    square,
    grads,
    rows,
    slots,
    behind,
    width,
    decay,
    size,
    root,
    eps,
    w1,
    b2,
    w2,
    kept1,
    kept2,
    seed,
    SWEEP: tl.constexpr,
    ROW_WISE: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Scalars come as tensors of one element in WIDE: arguments would be float32.
    program = tl.program_id(0).to(tl.int64)
    row = program if SWEEP else tl.load(rows + program)
    slot = tl.load(slots + row).to(tl.int64) if SWEEP else program
    missed = 0.0 if SWEEP else tl.load(behind + program).to(WIDE)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    places = row * width + columns
    g = tl.load(grads + slot * width + columns, mask=columns < tl.where(slot >= 0, width, 0), other=0.0)
    p = tl.load(values + places, mask=inside, other=0.0).to(WIDE)
    m = tl.load(mean + places, mask=inside, other=0.0)
    if not SWEEP:
        m = m * tl.exp2(missed * tl.load(kept1))
    m = m + tl.load(w1) * (g - m)
    if ROW_WISE:
        v = tl.load(square + row)
        g2 = tl.sum(g * g, 0) / width
    else:
        v = tl.load(square + places, mask=inside, other=0.0)
        g2 = g * g
    if not SWEEP:
        v = v * tl.exp2(missed * tl.load(kept2))
    v = v * tl.load(b2) + tl.load(w2) * g2
    if DECAYS:
        p = p * tl.load(decay)
    p = p - tl.load(size) * m / (tl.sqrt(v) / tl.load(root) + tl.load(eps))
    _store(values, places, p, inside, seed, STOCHASTIC)
    tl.store(mean + places, m, mask=inside)
    if ROW_WISE:
        tl.store(square + row, v)
    else:
        tl.store(square + places, v, mask=inside)


@triton.jit
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
    width,
    now,
    start,
    limit,
    length,
    seed,
    ROW_WISE: tl.constexpr,
    DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
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
    _store(values, places, p, inside, seed, STOCHASTIC)


def update(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """As reference.update."""
    behind_U = history.step - 1 - state.moment(rows_U)
    state.last_R[rows_U] = history.step
    state.moment_R[rows_U] = history.step
    state.touched_R[rows_U] = True
    if rows_U.numel():
        _step(state, grads_UD, history, len(rows_U), rows=rows_U, behind=behind_U)


def sweep(state: State, blocks: Blocks, rows_U: Tensor, grads_UD: Tensor, history: History) -> None:
    """As reference.sweep; finds a row's gradient through a map of 4 bytes a row."""
    state.touched_R[rows_U] = True
    slots_R = torch.full_like(state.last_R, -1)
    slots_R[rows_U] = torch.arange(len(rows_U), dtype=torch.int32, device=rows_U.device)
    _step(state, grads_UD, history, len(state.last_R), slots=slots_R)


def _step(
    state: State,
    grads_UD: Tensor,
    history: History,
    programs: int,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    behind: Tensor | None = None,
) -> None:
    hyper, at, width = history.hyper, history.at(history.step), state.mean_RD.shape[1]
    scalars = (
        history.decay[at],
        history.size[at],
        history.root[at],
        hyper.eps,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        *history.log2_kept,
    )
    constants = torch.tensor(scalars, dtype=torch.float64).to(state.mean_RD.device, state.mean_RD.dtype)
    _step_kernel[(programs,)](
        *state.tensors,
        grads_UD.contiguous(),
        rows,
        slots,
        behind,
        width,
        *constants.unbind(),
        _seed(state),
        SWEEP=rows is None,
        DECAYS=hyper.weight_decay != 0,
        **_constants(state),
    )


def replay(state: State, blocks: Blocks, rows_U: Tensor, history: History, limit: int | None, moments: bool) -> None:
    """As reference.replay; moments are brought up to date in any case."""
    if not moments:
        rows_U = rows_U[state.last(rows_U) < history.step]
    last_U = state.last(rows_U)
    if not rows_U.numel():
        return
    hyper, wide, device = history.hyper, state.mean_RD.dtype, state.mean_RD.device
    steps = history.table[:, : len(history.size)].clone()
    steps[3], steps[2] = history.log_decay[-1] - steps[2], steps[3].clone()
    constants = (1 - hyper.beta1, hyper.beta2, hyper.eps, *history.log2_kept)
    _replay_kernel[(len(rows_U),)](
        *state.tensors,
        state.touched_R,
        rows_U,
        last_U,
        state.moment(rows_U),
        steps.to(device, wide),
        torch.tensor(constants, dtype=torch.float64).to(device, wide),
        state.mean_RD.shape[1],
        history.step,
        history.start,
        EVERY if limit is None else limit,
        steps.shape[1],
        _seed(state),
        DECAYS=hyper.weight_decay != 0,
        **_constants(state),
    )
    state.last_R[rows_U] = history.step
    state.moment_R[rows_U] = history.step


def _constants(state: State) -> dict[str, object]:
    width = state.mean_RD.shape[1]
    return {
        "ROW_WISE": state.square_RX.shape[1] != width,
        "STOCHASTIC": state.noise is not None,
        "WIDE": tl.float64 if state.mean_RD.dtype == torch.float64 else tl.float32,
        "BLOCK_D": triton.next_power_of_2(width),
    }


def _seed(state: State) -> int:
    if state.noise is None:
        return 0
    return int(torch.randint(1 << 31, (), generator=state.noise, device=state.noise.device))
