"""Key usage of a finished model: which rows it reads for a fixed sample of text, and how evenly."""

from __future__ import annotations

from typing import Any

import torch

from suite.data.corpus import Corpus
from suite.models.transformer import Transformer
from suite.models.usage import Reads

BATCHES, BATCH_ROWS = 8, 16
"""The sample of training text, which is the same for every model of a corpus."""


@torch.no_grad()
def key_usage(model: Transformer, corpus: Corpus, processes: int = 1) -> dict[str, Any]:
    """Count the reads of every memory layer over fixed rows of training text; the model stays in evaluation mode.

    Args:
        processes: Number of processes that share the model; all of them call this.

    Returns:
        {"tokens"} and the result of `Reads.finish`; empty without a memory.
    """
    if not model.memory_layers():
        return {}
    model.eval()
    reads = Reads(model)
    reads.start()
    try:
        tokens = _read_text(model, corpus)
    finally:
        reads.detach()
    return {"tokens": tokens, **reads.finish(processes)}


def _read_text(model: Transformer, corpus: Corpus) -> int:
    device = next(model.parameters()).device
    loader = corpus.loader(0, BATCH_ROWS)
    tokens = 0
    for step in range(BATCHES):
        batch = loader.batch(step)
        model.hidden(batch.tokens_BT.to(device), batch.segments_BT.to(device))
        tokens += batch.tokens_BT.numel()
    return tokens
