"""Which rows a model reads: counts, and the share of reads that a cache of the most popular or the last rows has.

Shapes: N tokens, S rows read per token, R rows of a table, L reads in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from suite.inference.batching import evaluation_mode
from suite.models.memory_table import MemoryTable
from suite.models.transformer import Transformer

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Sizes of caches, as shares of a table's rows."""
LRU_READS = 1 << 18
"""Reads of a table that are simulated with an LRU cache."""

Rows = tuple[Tensor, Tensor]
"""Token ids and document numbers, [B, T] each."""


def reads_of(model: Transformer, text: Iterable[Rows]) -> list[Tensor]:
    """Return the rows that a model reads of each table for a text, int32 [L] in the order of the reads.

    A table that several layers read has one sequence; within a batch, the reads of a layer precede those of the next.
    """
    tables = model.memory_tables()
    reads: list[list[Tensor]] = [[] for _ in tables]

    def listener(table: MemoryTable, seen: list[Tensor]) -> None:
        table.before_read.append(lambda indices_NS: seen.append(indices_NS.flatten().to("cpu", torch.int32)))

    for table, seen in zip(tables, reads, strict=True):
        listener(table, seen)
    try:
        with evaluation_mode(model) as device:
            for tokens_BT, segments_BT in text:
                model.hidden(tokens_BT.to(device), segments_BT.to(device))
    finally:
        for table in tables:
            table.before_read.pop()
    return [torch.cat(seen) if seen else torch.empty(0, dtype=torch.int32) for seen in reads]


def counts_of(reads_L: Tensor, rows: int) -> Tensor:
    """Return how often each of `rows` rows was read, int64 [R]."""
    return reads_L.bincount(minlength=rows)


def static_hits(counts_R: Tensor, reads_L: Tensor, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the share of reads whose rows are among the most counted ones, for each size of a cache.

    Args:
        counts_R: Counts of another text, which choose the rows; ties by number.
        reads_L: The reads.
        shares: Sizes of the cache, as shares of all rows.
    """
    order_R = counts_R.argsort(descending=True, stable=True)
    cumulative_R = counts_of(reads_L, len(counts_R))[order_R].cumsum(0)
    return [float(cumulative_R[size_of(share, len(counts_R)) - 1]) / len(reads_L) for share in shares]


def lru_hits(reads_L: Tensor, rows: int, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the share of reads that a cache of the last rows has, for each of its sizes; it starts empty.

    Args:
        reads_L: The reads, one after the other; the first `LRU_READS` are simulated.
        rows: Rows of the table.
        shares: Sizes of the cache, as shares of all rows.
    """
    reads = reads_L[:LRU_READS].tolist()
    return [_lru_hits(reads, size_of(share, rows)) / len(reads) for share in shares]


def size_of(share: float, rows: int) -> int:
    """Return the rows of a cache of a share of a table, at least one."""
    return max(1, round(share * rows))


def _lru_hits(reads: Sequence[int], size: int) -> int:
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in reads:
        if row in cached:
            hits += 1
            cached.move_to_end(row)
        else:
            cached[row] = None
            if len(cached) > size:
                cached.popitem(last=False)
    return hits
