"""Weighted bags of table rows in Triton: one program per bag, per block of dot products, per chunk of sorted lookups.

Row sums. The lookups are sorted by row, and each program sums CHUNK consecutive ones, so that all programs have the
same work however often a row is read. A row whose lookups reach into a chunk from an earlier one is finished there: its
part goes to a buffer, one row per chunk, and the buffer's rows are added in the same way, CHUNK at a time. Grids depend
on the number of lookups alone, so the host never waits for a count.

Addresses are int64, sums float32 (float64 for float64 tables) in a fixed order, without atomics: results repeat bit
for bit.

Loop bounds are constants or `while` conditions: triton 3.6's interpreter cannot take the others with numpy 2.4.
Checked in Triton's interpreter and by compiling; not run on a device yet.

Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups, U unique rows, C chunks; B blocks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles + on tuples, but no unpacking)
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
CHUNK = 128
"""Sorted lookups that one program sums."""


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


@triton.jit(do_not_specialize=["lookups"])
def _sums_kernel(
    source,
    order,
    weights,
    targets,
    out,
    parts,
    part_targets,
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
    # is continued: its sum goes to parts [C, D], and the target to part_targets [C], which is -1 otherwise.
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = chunk * CHUNK
    count = tl.minimum(lookups - first, CHUNK)
    continued = tl.load(targets + first - 1, mask=first > 0, other=-1)
    target = tl.load(targets + first)
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
            given = start + slot < count
            if WEIGHTED:
                lookup = tl.load(order + place, mask=given, other=0).to(tl.int64)
                factors = factors + (tl.load(weights + lookup, mask=given, other=0.0).to(WIDE),)
                row = source + lookup // size * width
            else:
                row = source + place * width
                given = given & (tl.load(targets + place, mask=given, other=-1) >= 0)
            rows = rows + (tl.load(row + columns, mask=columns < tl.where(given, width, 0), other=0.0).to(WIDE),)
            nexts = nexts + (tl.load(targets + place + 1, mask=start + slot + 1 < count, other=-2),)
        for slot in tl.static_range(BLOCK_S):
            total += rows[slot] * factors[slot] if WEIGHTED else rows[slot]
            ends = nexts[slot] != target
            stored = columns < tl.where(ends & (target >= 0), width, 0)
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


def row_sums(source_ND: Tensor, weights_NS: Tensor, groups: Groups, wide: torch.dtype) -> Tensor:
    """See reference.row_sums."""
    sums_UD = torch.empty(len(groups.rows_U), source_ND.shape[1], dtype=wide, device=source_ND.device)
    starts_L = torch.zeros(len(groups.order_L), dtype=torch.int64, device=source_ND.device)
    targets_L = starts_L.index_fill_(0, groups.offsets_U, 1).cumsum(0) - 1
    sum_sorted(source_ND, weights_NS, groups.order_L, targets_L, sums_UD, adds=False)
    return sums_UD


def add_row_sums(source_ND: Tensor, weights_NS: Tensor, groups: Groups, whole_RD: Tensor) -> None:
    """Add the row sums to those rows of a buffer of the whole table, in place."""
    counts_U = torch.diff(groups.offsets_U, append=groups.offsets_U.new_full((1,), len(groups.order_L)))
    targets_L = torch.repeat_interleave(groups.rows_U, counts_U, output_size=len(groups.order_L))
    sum_sorted(source_ND, weights_NS, groups.order_L, targets_L, whole_RD, adds=True)


def sum_sorted(
    source_ND: Tensor, weights_NS: Tensor, order_L: Tensor, targets_L: Tensor, out: Tensor, adds: bool
) -> None:
    """Sum weighted rows of `source_ND` into rows of `out`.

    Args:
        source_ND: One row per bag, any float dtype.
        weights_NS: The factor of every lookup.
        order_L: int64 positions of the lookups in the flattened weights, sorted by target.
        targets_L: int64 rows of `out`, ascending.
        out: float32 (float64) [*, D]; rows that are no target stay as they are.
        adds: Add to what `out` holds instead of replacing it.
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
        source, targets, is_weighted, adds = parts_CD, part_targets_C, False, True
        lookups = chunks if chunks > 1 else 0


def _columns(width: int) -> int:
    return min(WIDTH, triton.next_power_of_2(width))


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
