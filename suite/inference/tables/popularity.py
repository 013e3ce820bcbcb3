"""Which rows a model reads: counts, and the share of reads that a cache of the most popular or the last rows has.

Shapes: N tokens, S rows read per token, R rows of a table, L reads in order.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from suite.data.corpus import Corpus
from suite.inference.batching import evaluation_mode
from suite.inference.tables.stores import rows_of_share
from suite.models.memory_table import MemoryTable
from suite.models.transformer import Transformer

BATCHES, BATCH_ROWS = 8, 16
"""The sample of text."""
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


def counts(model: Transformer, text: Iterable[Rows]) -> list[Tensor]:
    """Return how often a model reads each row of each table for a text, int64 [R] by table."""
    tables = model.memory_tables()
    return [counts_of(reads_L, len(table.weight)) for reads_L, table in zip(reads_of(model, text), tables, strict=True)]


def training_text(corpus: Corpus, first: int = 0, batches: int = BATCHES) -> Iterator[Rows]:
    """Yield a fixed sample of training text, the same for every model of a corpus, from batch `first` on."""
    loader = corpus.loader(0, BATCH_ROWS)
    for step in range(first, first + batches):
        batch = loader.batch(step)
        yield batch.tokens_BT, batch.segments_BT


def other_text(corpus: Corpus) -> tuple[str, list[Rows]]:
    """Return the kind and the rows of a text other than `training_text`: the first held-out documents, packed into
    rows, or, without any, the training text that follows.
    """
    if not corpus.held_out:
        return "training text that follows", list(training_text(corpus, BATCHES))
    length, eot = corpus.config.seq_len, corpus.tokenizer.eot_id
    stream = (token for text in corpus.held_out for token in (eot, *corpus.tokenizer.encode(text)))
    ids = list(itertools.islice(stream, BATCHES * BATCH_ROWS * length))
    ids += [eot] * (-len(ids) % length)
    tokens_XT = torch.tensor(ids).view(-1, length)
    return "held-out text", [(part_BT, (part_BT == eot).cumsum(1)) for part_BT in tokens_XT.split(BATCH_ROWS)]


def counts_of(reads_L: Tensor, rows: int) -> Tensor:
    """Return how often each of `rows` rows was read, int64 [R]."""
    return reads_L.bincount(minlength=rows)


def most_read(counts_R: Tensor, count: int) -> Tensor:
    """Return the numbers of the rows with the highest counts, int64, ties by number."""
    return counts_R.argsort(descending=True, stable=True)[:count]


def static_hits(counts_R: Tensor, reads_L: Tensor, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the share of reads whose rows are among the most counted ones, for each size of a cache.

    Args:
        counts_R: Counts of another text, which choose the rows; ties by number.
        reads_L: The reads.
        shares: Sizes of the cache, as shares of all rows.
    """
    order_R = counts_R.argsort(descending=True, stable=True)
    cumulative_R = counts_of(reads_L, len(counts_R))[order_R].cumsum(0)
    return [float(cumulative_R[rows_of_share(share, len(counts_R)) - 1]) / len(reads_L) for share in shares]


def lru_hits(reads_L: Tensor, rows: int, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the share of reads that a cache of the last rows has, for each of its sizes; it starts empty.

    Args:
        reads_L: The reads, one after the other; the first `LRU_READS` are simulated.
        rows: Rows of the table.
        shares: Sizes of the cache, as shares of all rows.
    """
    reads = reads_L[:LRU_READS].tolist()
    return [_lru_hits(reads, rows_of_share(share, rows)) / len(reads) for share in shares]


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
