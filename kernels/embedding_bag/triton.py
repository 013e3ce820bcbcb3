"""Weighted bags of table rows in Triton: one program per bag, per block of dot products, per chunk of sorted lookups.

Row sums. The lookups are sorted by row, and each program sums CHUNK consecutive ones, so that all programs have the
same work however often a row is read. A row whose lookups reach into a chunk from an earlier one is finished there: its
part goes to a buffer, one row per chunk, and the buffer's rows are added in the same way, CHUNK at a time. Grids depend
on the number of lookups alone, so the host never waits for a count. How many rows were read is known to the device
alone: rows and sums have places for as many rows as there are lookups (or table rows), and unused places hold the row R
and zeros.

Addresses are int64, sums float32 (float64 for float64 tables) in a fixed order, without atomics: results repeat bit
for bit.

Loop bounds are constants or `while` conditions: triton 3.6's interpreter cannot take the others with numpy 2.4.
Checked in Triton's interpreter and by compiling; not run on a device yet.

Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups, P = min(L, R + 1) places for unique rows,
C chunks; B blocks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles + on tuples, but no unpacking)
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.embedding_bag.reference import accumulator

LOOKUPS = 8
"""Rows loaded together by a program."""
WIDTH = 512
"""Most columns of a program."""
CHUNK = 128
"""Sorted lookups that one program sums."""


@dataclass(frozen=True, eq=False)
class Lookups:
    """Lookups sorted by the row they read.

    Attributes:
        rows_L: Their rows, ascending.
        order_L: Their places in the flattened indices, int64.
        table_rows: Rows of the table (R). Lookups of row R are of no row.
    """

    rows_L: Tensor
    order_L: Tensor
    table_rows: int

    @functools.cached_property
    def unique(self) -> tuple[Tensor, Tensor]:
        """The rows that are read, int64 [P], ascending, with R in unused places; and the place of each lookup, [L]."""
        places_L = F.pad((self.rows_L[1:] != self.rows_L[:-1]).cumsum(0), (1, 0))
        room = min(len(self.rows_L), self.table_rows + 1)
        rows_P = torch.full((room,), self.table_rows, dtype=torch.int64, device=places_L.device)
        rows_P.index_copy_(0, places_L, self.rows_L.long())  # lookups of one place have the same row
        return rows_P, places_L


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
        valid = slots < size
        rows = tl.load(indices + bag * size + slots, mask=valid, other=0).to(tl.int64)
        factors = tl.load(weights + bag * size + slots, mask=valid, other=0.0).to(WIDE)
        both = valid[:, None] & inside[None, :]
        values = tl.load(table + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
        total += tl.sum(values * factors[:, None], 0)
    tl.store(out + bag * width + columns, total, mask=inside)


@triton.jit
def _dots_kernel(
    table, indices, x, out, size, width: tl.constexpr, WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = slots < size
    rows = tl.load(indices + bag * size + slots, mask=valid, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_S,), WIDE)
    for start in range(0, width, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < width
        vector = tl.load(x + bag * width + columns, mask=inside, other=0.0).to(WIDE)
        both = valid[:, None] & inside[None, :]
        values = tl.load(table + rows[:, None] * width + columns[None, :], mask=both, other=0.0).to(WIDE)
        total += tl.sum(values * vector[None, :], 1)
    tl.store(out + bag * size + slots, total, mask=valid)


@triton.jit(do_not_specialize=["lookups"])
def _sums_kernel(
    source,
    order,
    weights,
    targets,
    out,
    parts,
    part_targets,
    flags,
    lookups,
    width,
    size: tl.constexpr,
    WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A scalar condition is a bound on the columns here: Triton's interpreter broadcasts no booleans.
    # targets [L]: rows of `out`, ascending but for -1, which is to be skipped. A target that the chunk before has too
    # is continued: its sum goes to parts [C, D], and the target to part_targets [C], which is -1 otherwise. The flags
    # of targets that begin in this chunk are set.
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = chunk * CHUNK
    count = tl.minimum(lookups - first, CHUNK)
    continued = tl.load(targets + first - 1, mask=first > 0, other=-1).to(tl.int64)
    target = tl.load(targets + first).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(part_targets + chunk, tl.where(target == continued, target, -1))
    total = tl.zeros((BLOCK_D,), WIDE)
    start = 0
    while start < count:
        # All loads of BLOCK_S lookups before any of the stores, so that they are in flight together.
        rows = ()
        factors = ()
        nexts = ()
        for slot in tl.static_range(BLOCK_S):
            place = first + start + slot
            valid = start + slot < count
            if WEIGHTED:
                lookup = tl.load(order + place, mask=valid, other=0).to(tl.int64)
                factors = factors + (tl.load(weights + lookup, mask=valid, other=0.0).to(WIDE),)
                row = source + lookup // size * width
            else:
                row = source + place * width
                valid = valid & (tl.load(targets + place, mask=valid, other=-1) >= 0)
            rows = rows + (tl.load(row + columns, mask=columns < tl.where(valid, width, 0), other=0.0).to(WIDE),)
            nexts = nexts + (tl.load(targets + place + 1, mask=start + slot + 1 < count, other=-2).to(tl.int64),)
        for slot in tl.static_range(BLOCK_S):
            total += rows[slot] * factors[slot] if WEIGHTED else rows[slot]
            ends = nexts[slot] != target
            stored = columns < tl.where(ends & (target >= 0), width, 0)
            if flags is not None:
                tl.store(flags + target, 1, mask=ends & (target >= 0) & (target != continued))
            place = tl.where(target == continued, chunk, target) * width
            destination = tl.where(target == continued, parts + place, out + place) + columns
            if ADDS:
                adds = columns < tl.where(ends & (target >= 0) & (target != continued), width, 0)
                tl.store(destination, tl.load(destination, mask=adds, other=0.0) + total, mask=stored)
            else:
                tl.store(destination, total, mask=stored)
            total = tl.where(ends, 0.0, total)
            target = nexts[slot]
        start += BLOCK_S


def bag(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, dtype: torch.dtype) -> Tensor:
    """See reference.bag."""
    (bags, size), width = indices_NS.shape, table_RD.shape[1]
    if not size:
        return table_RD.new_zeros(bags, width, dtype=dtype)
    out_ND = table_RD.new_empty(bags, width, dtype=dtype)
    if bags:
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
    """See reference.dots."""
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


def group_by_row(indices_NS: Tensor, table_rows: int) -> Lookups:
    """Sort the lookups by row, stably, on the narrowest integers that hold the rows."""
    narrow = torch.int32 if table_rows < 1 << 31 else torch.int64
    rows_L, order_L = indices_NS.reshape(-1).to(narrow).sort(stable=True)
    return Lookups(rows_L, order_L, table_rows)


def row_sums(source_ND: Tensor, weights_NS: Tensor, lookups: Lookups, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows that were read and their sums (see reference.row_sums), with room for all lookups.

    Args:
        source_ND: One row per bag.
        weights_NS: The factor of every lookup.
        lookups: The lookups, sorted; there is one at least. Those of no row have zero sources.
        wide: Dtype of the sums.

    Returns:
        rows_P int64, ascending, R in unused places; sums_PD, zero there.
    """
    rows_P, places_L = lookups.unique
    sums_PD = torch.zeros(len(rows_P), source_ND.shape[1], dtype=wide, device=source_ND.device)
    sum_sorted(source_ND, weights_NS, lookups.order_L, places_L, sums_PD, adds=False)
    return rows_P, sums_PD


def merge(rows_P: Tensor, sums_PD: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Add up the sums of equal rows, as `row_sums` returns them, in their order; any rows may have the number R."""
    factors_P1 = sums_PD.new_ones(len(rows_P), 1)
    return row_sums(sums_PD, factors_P1, group_by_row(rows_P, table_rows), sums_PD.dtype)


def add_row_sums(
    source_ND: Tensor, weights_NS: Tensor, lookups: Lookups, whole_RD: Tensor, is_read_R: Tensor | None = None
) -> None:
    """Add the row sums to those rows of a buffer of the whole table, in place, and set the flags of those rows."""
    sum_sorted(source_ND, weights_NS, lookups.order_L, lookups.rows_L, whole_RD, adds=True, flags=is_read_R)


def sum_sorted(
    source_ND: Tensor,
    weights_NS: Tensor,
    order_L: Tensor,
    targets_L: Tensor,
    out: Tensor,
    adds: bool,
    flags: Tensor | None = None,
) -> None:
    """Sum weighted rows of `source_ND` into rows of `out`.

    Args:
        source_ND: One row per bag, any float dtype.
        weights_NS: The factor of every lookup.
        order_L: int64 positions of the lookups in the flattened weights, sorted by target.
        targets_L: Rows of `out`, integers, ascending.
        out: float32 (float64) [*, D]; rows that are no target stay as they are.
        adds: Add to what `out` holds instead of replacing it.
        flags: bool, set for every target.
    """
    width, block, lookups = out.shape[1], _columns(out.shape[1]), len(order_L)
    source, weights, order, targets = source_ND.contiguous(), weights_NS.contiguous(), order_L, targets_L
    is_weighted = True
    while lookups:
        chunks = triton.cdiv(lookups, CHUNK)
        parts_CD = torch.empty(chunks, width, dtype=out.dtype, device=out.device)
        part_targets_C = torch.empty(chunks, dtype=torch.int64, device=out.device)
        _sums_kernel[(chunks, triton.cdiv(width, block))](
            source,
            order,
            weights,
            targets,
            out,
            parts_CD,
            part_targets_C,
            flags,
            lookups,
            width,
            weights_NS.shape[1],
            WIDE=_wide(out.dtype),
            WEIGHTED=is_weighted,
            ADDS=adds,
            CHUNK=CHUNK,
            BLOCK_S=LOOKUPS,
            BLOCK_D=block,
            num_warps=max(1, min(4, block * source.element_size() // 512)),
        )
        source, targets, is_weighted, adds, flags = parts_CD, part_targets_C, False, True, None
        lookups = chunks if chunks > 1 else 0


def _columns(width: int) -> int:
    return min(WIDTH, triton.next_power_of_2(width))


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
