"""Key usage of a finished model: which rows it reads for a fixed sample of text, how evenly, and how well caches do."""

from __future__ import annotations

from typing import Any

import torch

from suite.data.corpus import Corpus
from suite.inference.tables import popularity
from suite.models.transformer import Transformer
from suite.models.usage import Reads


@torch.no_grad()
def key_usage(model: Transformer, corpus: Corpus, processes: int = 1) -> dict[str, Any]:
    """Count the reads of every memory layer over fixed rows of training text; the model stays in evaluation mode.

    Args:
        processes: Number of processes that share the model; all of them call this.

    Returns:
        {"tokens"} and the result of `Reads.finish`; empty without a memory. A single process adds "hit_rates": the
        share of the reads of each table, for another text, that a cache of some rows has. A static cache holds the
        rows that were read most in the training text.
    """
    if not model.memory_layers():
        return {}
    model.eval()
    text = list(popularity.training_text(corpus))
    reads = Reads(model)
    reads.start()
    try:
        by_table = popularity.reads_of(model, text)
    finally:
        reads.detach()
    usage = {"tokens": sum(tokens_BT.numel() for tokens_BT, _ in text), **reads.finish(processes)}
    return usage if processes > 1 else usage | {"hit_rates": _hit_rates(model, corpus, by_table)}


def _hit_rates(model: Transformer, corpus: Corpus, counted: list[torch.Tensor]) -> dict[str, Any]:
    """Return {"text", "shares", "tables": [{"static", "lru"}]}, tables in the order of the model's."""
    kind, text = popularity.other_text(corpus)
    tables = []
    for table, before_L, reads_L in zip(model.memory_tables(), counted, popularity.reads_of(model, text), strict=True):
        rows = len(table.weight)
        counts_R = popularity.counts_of(before_L, rows)
        tables.append({"static": popularity.static_hits(counts_R, reads_L), "lru": popularity.lru_hits(reads_L, rows)})
    return {"text": kind, "shares": list(popularity.SHARES), "tables": tables}
