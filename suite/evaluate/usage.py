"""Key usage of a finished model: which rows it reads for a fixed sample of text, how evenly, and how well caches do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from suite.data.corpus import Corpus
from suite.inference.tables import popularity
from suite.models.transformer import Transformer
from suite.models.usage import Reads


@torch.no_grad()
def key_usage(
    model: Transformer, corpus: Corpus, processes: int = 1, on_progress: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Count the reads of every memory layer over fixed rows of training text; the model stays in evaluation mode.

    Args:
        processes: Number of processes that share the model; all of them call this.
        on_progress: Called with the share of the text that has been read, after every batch.

    Returns:
        {"tokens"} and the result of `Reads.finish`; empty without a memory. A single process adds "hit_rates": the
        share of the reads of each table, for another text, that a cache of some rows has. A static cache holds the
        rows that were read most in the training text.
    """
    if not model.memory_layers():
        return {}
    model.eval()
    text = list(popularity.training_text(corpus))
    kind, other = popularity.other_text(corpus) if processes == 1 else ("", [])
    batches = len(text) + len(other)
    reads = Reads(model)
    reads.start()
    try:
        by_table = popularity.reads_of(model, _with_progress(text, on_progress, 0, batches))
    finally:
        reads.detach()
    usage = {"tokens": sum(tokens_BT.numel() for tokens_BT, _ in text), **reads.finish(processes)}
    if processes > 1:
        return usage
    others = popularity.reads_of(model, _with_progress(other, on_progress, len(text), batches))
    return usage | {
        "hit_rates": {"text": kind, "shares": [*popularity.SHARES], "tables": _hits(model, by_table, others)}
    }


def _with_progress(
    text: Sequence[popularity.Rows], on_progress: Callable[[float], None], before: int, batches: int
) -> Iterator[popularity.Rows]:
    """Yield the batches of a text, and report the share of all `batches` once each has been read."""
    for number, rows in enumerate(text, start=before + 1):
        yield rows
        on_progress(number / batches)


def _hits(model: Transformer, counted: list[torch.Tensor], read: list[torch.Tensor]) -> list[dict[str, list[float]]]:
    """Return {"static", "lru"} for each table of the model, from the reads of two texts."""
    tables = []
    for table, before_L, reads_L in zip(model.memory_tables(), counted, read, strict=True):
        rows = len(table.weight)
        counts_R = popularity.counts_of(before_L, rows)
        tables.append({"static": popularity.static_hits(counts_R, reads_L), "lru": popularity.lru_hits(reads_L, rows)})
    return tables
