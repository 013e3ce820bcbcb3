"""Weighted bags of table rows in Triton: what reference.py does, one program per bag, dot block or run of a row.

Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups, U unique rows, C runs; B block.
Addresses are int64, sums float32 (float64 for float64 tables) in a fixed order, without atomics: results repeat bit
for bit. A row's lookups are cut into runs of RUN, summed by different programs and then over runs in order, level by
level, so that one hot row does not keep a single program busy.

Loop bounds are constants or `while` conditions: triton 3.6's interpreter cannot take the others with numpy 2.4.
Tested under TRITON_INTERPRET=1 only. Not measured or run on a GPU yet: block sizes and warps are guesses, and
bandwidth is unknown.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.embedding_bag.reference import Groups, accumulator

LOOKUPS = 8
"""Rows loaded together by a program."""
WIDTH = 512
"""Most columns of a program."""
RUN = 256
"""Lookups of one row that one program sums."""


@triton.jit
def _bag_kernel(
    table,
    indices,
    weights,
    out,
    size: tl.constexpr,
    width,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    total = tl.zeros((BLOCK_D,), WIDE)
    for start in range(0, size, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        given = slots < size
        rows = tl.load(indices + bag * size + slots, mask=given, other=0).to(tl.int64)
        factors = tl.load(weights + bag * size + slots, mask=given, other=0.0).to(WIDE)
        both = given[:, None] & inside[None, :]
        values = tl.load(table + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
        total += tl.sum(values * factors[:, None], 0)
    tl.store(out + bag * width + columns, total, mask=inside)


@triton.jit
def _dots_kernel(
    table, indices, x, out, size, width: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    given = slots < size
    rows = tl.load(indices + bag * size + slots, mask=given, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_S,), WIDE)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < width
        vector = tl.load(x + bag * width + columns, mask=inside, other=0.0).to(WIDE)
        both = given[:, None] & inside[None, :]
        values = tl.load(table + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
        total += tl.sum(values * vector[None, :], 1)
    tl.store(out + bag * size + slots, total, mask=given)


@triton.jit
def _runs_kernel(
    source,
    order,
    weights,
    starts,
    counts,
    targets,
    out,
    size,
    width,
    WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    first = tl.load(starts + run)
    count = tl.load(counts + run)
    total = tl.zeros((BLOCK_D,), WIDE)
    start = 0
    while start < count:
        slots = start + tl.arange(0, BLOCK_S)
        given = slots < count
        both = given[:, None] & inside[None, :]
        places = first + slots
        if WEIGHTED:
            lookups = tl.load(order + places, mask=given, other=0).to(tl.int64)
            factors = tl.load(weights + lookups, mask=given, other=0.0).to(WIDE)
            bags = lookups // size
            values = tl.load(source + bags[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
            total += tl.sum(values * factors[:, None], 0)
        else:
            values = tl.load(source + places[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
            total += tl.sum(values, 0)
        start += BLOCK_S
    target = tl.load(targets + run)
    tl.store(out + target * width + columns, total, mask=inside)


def bag(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, dtype: torch.dtype) -> Tensor:
    """As reference.bag."""
    (bags, size), width = indices_NS.shape, table_RD.shape[1]
    out_ND = table_RD.new_zeros(bags, width, dtype=dtype)
    if indices_NS.numel():
        block = _columns(width)
        wide = _wide(accumulator(table_RD.dtype))
        _bag_kernel[(bags, triton.cdiv(width, block))](
            table_RD.contiguous(),
            indices_NS.contiguous(),
            weights_NS.contiguous(),
            out_ND,
            size,
            width,
            WIDE=wide,
            BLOCK_S=LOOKUPS,
            BLOCK_D=block,
        )
    return out_ND


def dots(table_RD: Tensor, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
    """As reference.dots."""
    (bags, size), width = indices_NS.shape, table_RD.shape[1]
    dtype = accumulator(table_RD.dtype)
    out_NS = torch.empty(bags, size, dtype=dtype, device=table_RD.device)
    if indices_NS.numel():
        _dots_kernel[(bags, triton.cdiv(size, LOOKUPS))](
            table_RD.contiguous(),
            indices_NS.contiguous(),
            x_ND.contiguous(),
            out_NS,
            size,
            width,
            WIDE=_wide(dtype),
            BLOCK_S=LOOKUPS,
            BLOCK_D=_columns(width),
        )
    return out_NS


def row_sums(source_ND: Tensor, weights_NS: Tensor, groups: Groups, wide: torch.dtype) -> Tensor:
    """As reference.row_sums."""
    counts_U = torch.diff(groups.offsets_U, append=groups.offsets_U.new_tensor([len(groups.order_L)]))
    return _sum_runs(source_ND.contiguous(), groups.order_L, weights_NS.contiguous(), groups.offsets_U, counts_U, wide)


def _sum_runs(
    source: Tensor,
    order_L: Tensor | None,
    weights: Tensor | None,
    starts_U: Tensor,
    counts_U: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """Sums [U, D] of consecutive lookups; without `order_L`, of consecutive source rows.

    Rows of one run are written in place; the runs of the others go behind them and are summed by the next level.
    """
    rows, width = len(starts_U), source.shape[1]
    runs_U = (counts_U + RUN - 1) // RUN
    hot_U = runs_U > 1
    row_C = torch.repeat_interleave(torch.arange(rows, device=source.device), runs_U)
    nth_C = torch.arange(len(row_C), device=source.device) - (runs_U.cumsum(0) - runs_U)[row_C]
    behind_U = torch.where(hot_U, runs_U, 0)
    extra_U = rows + behind_U.cumsum(0) - behind_U
    targets_C = torch.where(hot_U[row_C], extra_U[row_C] + nth_C, row_C)
    out = torch.empty(rows + int(behind_U.sum()), width, dtype=wide, device=source.device)
    if rows:
        block = _columns(width)
        _runs_kernel[(len(row_C), triton.cdiv(width, block))](
            source,
            order_L if order_L is not None else starts_U,
            weights if weights is not None else source,
            starts_U[row_C] + nth_C * RUN,
            (counts_U[row_C] - nth_C * RUN).clamp(max=RUN),
            targets_C,
            out,
            weights.shape[1] if weights is not None else 1,
            width,
            WIDE=_wide(wide),
            WEIGHTED=order_L is not None,
            BLOCK_S=LOOKUPS,
            BLOCK_D=block,
        )
    if len(out) > rows:
        out[:rows][hot_U] = _sum_runs(out, None, None, extra_U[hot_U], runs_U[hot_U], wide)
    return out[:rows]


def _columns(width: int) -> int:
    return min(WIDTH, triton.next_power_of_2(width))


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
