"""How a finished model uses its memory: which rows are read, and how evenly.

The measures of Lample et al. 2019 (Large Memory Layers with Product Keys, arXiv 1907.05242, section 4.4), over
counts of reads. Shapes: N tokens, S rows of the table read per token, R rows of the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from suite.data import Corpus
from suite.models.memory_table import MemoryTable
from suite.models.transformer import Transformer

BATCHES, BATCH_ROWS = 8, 16
"""How much training text is read: a fixed sample, the same for every model of a corpus."""


class _Reads:
    """Counts the rows every memory layer reads while it is attached; `by_layer[index]` is counts_R."""

    def __init__(self, model: Transformer) -> None:
        self.by_layer = {
            index: torch.zeros(len(_table(layer).weight), dtype=torch.int64)
            for index, layer in model.memory_layers().items()
        }
        self._reading = -1
        self._handles = [
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            for index, layer in model.memory_layers().items()
        ]
        self._tables = {id(_table(layer)): _table(layer) for layer in model.memory_layers().values()}
        for table in self._tables.values():
            table.before_read.append(self._count)

    def _enter(self, index: int) -> None:
        self._reading = index

    def _count(self, indices_NS: Tensor) -> None:
        counts_R = self.by_layer[self._reading]
        counts_R += torch.bincount(indices_NS.flatten().cpu(), minlength=len(counts_R))

    def detach(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        for table in self._tables.values():
            table.before_read.remove(self._count)


@torch.no_grad()
def key_usage(model: Transformer, corpus: Corpus) -> dict[str, Any]:
    """Reads of every memory layer over fixed rows of the training text; the model is left in evaluation mode.

    Returns:
        {"tokens", "layers": {layer: measures}, "tables": [measures and "layers"]}, the reads of all layers that
        share a table taken together in `tables`; measures are {"rows", "reads", "used": the share of rows read at
        least once, "kl_bits": the divergence of the reads from even use, 0 to log2 rows}. Empty without a memory.
    """
    layers = model.memory_layers()
    if not layers:
        return {}
    model.eval()
    reads = _Reads(model)
    try:
        tokens = _read_text(model, corpus)
    finally:
        reads.detach()
    sharing: dict[int, list[int]] = {}
    for index, layer in layers.items():
        sharing.setdefault(id(_table(layer)), []).append(index)
    return {
        "tokens": tokens,
        "layers": {str(index): measures(counts_R) for index, counts_R in reads.by_layer.items()},
        "tables": [
            {"layers": indices, **measures(torch.stack([reads.by_layer[index] for index in indices]).sum(0))}
            for indices in sharing.values()
        ],
    }


def measures(counts_R: Tensor) -> dict[str, float]:
    """Rows, reads, the share of rows read at all, and the divergence of the reads from even use in bits."""
    rows, reads = len(counts_R), int(counts_R.sum())
    shares_U = counts_R[counts_R > 0].double() / max(reads, 1)
    entropy_bits = float(-(shares_U * shares_U.log2()).sum())
    used = float((counts_R > 0).double().mean())
    return {"rows": rows, "reads": reads, "used": used, "kl_bits": max(0.0, math.log2(rows) - entropy_bits)}


def _read_text(model: Transformer, corpus: Corpus) -> int:
    device = next(model.parameters()).device
    loader = corpus.loader(0, BATCH_ROWS)
    tokens = 0
    for step in range(BATCHES):
        batch = loader.batch(step)
        model.hidden(batch.tokens_BT.to(device), batch.segments_BT.to(device))
        tokens += batch.tokens_BT.numel()
    return tokens


def _table(layer: nn.Module) -> MemoryTable:
    """The table a layer is counted by; where it has several, all are read at the same rows."""
    tables: list[MemoryTable] = layer.tables  # type: ignore[assignment]
    return tables[0]
