"""Weighted bags of table rows in PyTorch: the reference on any device.

Shapes: R table rows, D width, N bags, S rows read per bag, L = N*S lookups, U unique rows read (U <= L).
Sums are in float32 (float64 for float64 tables) whatever the table's dtype, and in a fixed order: with one thread
results repeat bit for bit.

Row gradients are a bag too: of output gradients per row instead of rows per token. The lookups are sorted by row, and
F.embedding_bag sums them without a temporary of L*D values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = {"cpu": 1 << 17}
"""Gathered values per chunk; 512 KiB fit in a core's second-level cache."""
CHUNK_ELEMENTS_GPU = 1 << 26


class Groups(NamedTuple):
    """Lookups grouped by the row they read: rows_U int64 ascending; the lookups of rows_U[u] are
    order_L[offsets_U[u] : offsets_U[u + 1]] (int64 positions in the flattened indices, ascending)."""

    rows_U: Tensor
    offsets_U: Tensor
    order_L: Tensor


def group_by_row(indices_NS: Tensor, table_rows: int) -> Groups:
    """Group int64 indices in [0, table_rows) by a stable sort, on the narrowest integers that hold them."""
    narrow = torch.int16 if table_rows <= 1 << 15 else torch.int32 if table_rows <= 1 << 31 else torch.int64
    sorted_L, order_L = indices_NS.reshape(-1).to(narrow).sort(stable=True)
    rows_U, counts_U = torch.unique_consecutive(sorted_L, return_counts=True)
    return Groups(rows_U.long(), counts_U.cumsum(0) - counts_U, order_L)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over a table of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bag(table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return out_ND[n] = sum over s of weights[n, s] * table[indices[n, s]].

    Args:
        table_RD: The table, any float dtype.
        indices_NS: Rows of the table, int64 in [0, R).
        weights_NS: Weights, any float dtype.
        dtype: Dtype of the result.
    """
    (bags, size), width = indices_NS.shape, table_RD.shape[1]
    if indices_NS.numel() == 0:
        return table_RD.new_zeros(bags, width, dtype=dtype)
    wide = accumulator(table_RD.dtype)
    weights_NS = weights_NS.to(wide)
    if table_RD.dtype == wide:
        return F.embedding_bag(indices_NS, table_RD, mode="sum", per_sample_weights=weights_NS).to(dtype)
    out_ND = table_RD.new_empty(bags, width, dtype=dtype)
    for part in _chunks(bags, size * width, table_RD.device):
        rows_CSD = _gather(table_RD, indices_NS[part]).to(wide)
        out_ND[part] = torch.bmm(weights_NS[part].unsqueeze(1), rows_CSD).squeeze(1)
    return out_ND


def dots(table_RD: Tensor, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
    """Return dots_NS[n, s] = <table[indices[n, s]], x[n]>, in float32 (float64 for a float64 table).

    If x is the gradient of the output, these are the gradients of the bag's weights.

    Args:
        table_RD: The table, any float dtype.
        indices_NS: Rows of the table, int64 in [0, R).
        x_ND: One vector per bag, any float dtype.
    """
    (bags, size), width = indices_NS.shape, table_RD.shape[1]
    wide = accumulator(table_RD.dtype)
    dots_NS = x_ND.new_empty(bags, size, dtype=wide)
    for part in _chunks(bags, size * width, table_RD.device):
        rows_CSD = _gather(table_RD, indices_NS[part]).to(wide)
        torch.bmm(rows_CSD, x_ND[part].to(wide).unsqueeze(-1), out=dots_NS[part].unsqueeze(-1))
    return dots_NS


def row_sums(source_ND: Tensor, weights_NS: Tensor, groups: Groups, wide: torch.dtype) -> Tensor:
    """Return sums_UD[u] = sum over the lookups (n, s) of rows_U[u] of weights[n, s] * source[n].

    If the source is the gradient of the output, this is the gradient of the rows read. Lookups are summed in their
    order.

    Args:
        source_ND: One vector per bag, any float dtype.
        weights_NS: The factor of every lookup, any float dtype.
        groups: The lookups, grouped by row.
        wide: Dtype of the sums.
    """
    if groups.rows_U.numel() == 0:
        return source_ND.new_zeros(0, source_ND.shape[1], dtype=wide)
    weights_L = weights_NS.reshape(-1).to(wide).index_select(0, groups.order_L)
    bags_L = groups.order_L.div(weights_NS.shape[1], rounding_mode="floor")
    return F.embedding_bag(bags_L, source_ND.to(wide), groups.offsets_U, mode="sum", per_sample_weights=weights_L)


def sum_pieces(sums: list[Tensor], groups: Groups) -> Tensor:
    """Merge compact row gradients of several reads of one table, in their order; `groups` are of their rows."""
    return F.embedding_bag(groups.order_L, torch.cat(sums), groups.offsets_U, mode="sum")


def _gather(table_RD: Tensor, indices_CS: Tensor) -> Tensor:
    return table_RD.index_select(0, indices_CS.reshape(-1)).view(*indices_CS.shape, table_RD.shape[1])


def _chunks(bags: int, per_bag: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_GPU) // max(1, per_bag))
    return (slice(start, start + step) for start in range(0, bags, step))
