"""Weighted bags of float32 rows on a CPU, partly in C (native.c); results as in reference.py.

Bags and row sums are reference.py's, since F.embedding_bag is fast. Grouping by row returns the same groups, faster.
Dot products are summed in 16 lanes: another order, which depends on the width alone. The C code uses one thread.
Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups.
"""

from __future__ import annotations

from torch import Tensor

from kernels.embedding_bag.reference import Groups, bag, row_sums
from kernels.native import call

__all__ = ["bag", "dots", "group_by_row", "row_sums"]


def dots(table_RD: Tensor, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
    """See reference.dots; `table_RD` is contiguous."""
    (bags, size), (rows, width) = indices_NS.shape, table_RD.shape
    dots_NS, indices_NS = table_RD.new_empty(bags, size), indices_NS.long().contiguous()
    outside = call("dots", table_RD, indices_NS, x_ND.float().contiguous(), dots_NS, bags, size, rows, width)
    _refuse(indices_NS, outside, rows)
    return dots_NS


def group_by_row(indices_NS: Tensor, table_rows: int) -> Groups:
    """Group lookups as reference.group_by_row does, by a radix sort of rows and lookups packed into 64 bits."""
    indices_L = indices_NS.reshape(-1).long().contiguous()
    lookups = len(indices_L)
    sorted_L, other_L = indices_L.new_empty(lookups), indices_L.new_empty(lookups)
    unique = call("sort_by_row", indices_L, sorted_L, other_L, lookups, table_rows)
    _refuse(indices_L, -1 - unique, table_rows)
    rows_U, offsets_U = indices_L.new_empty(unique), indices_L.new_empty(unique)
    call("split_sorted", sorted_L, rows_U, offsets_U, lookups)
    return Groups(rows_U, offsets_U, sorted_L)


def _refuse(indices: Tensor, place: int, rows: int) -> None:
    """Raise IndexError for the index at `place`, which is out of range; a negative place means that none is."""
    if place >= 0:
        index = indices.reshape(-1)[place].item()
        raise IndexError(f"index out of range: got {index}, allowed: 0 to {rows - 1} (rows of the table)")
