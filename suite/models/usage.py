"""Key usage: which rows of its tables a model reads, and how evenly.

The measures are those of Lample et al. 2019 (Large Memory Layers with Product Keys, arXiv 1907.05242, section 4.4),
computed from counts of reads. Training measures the steps it logs, evaluation a sample of text.
Shapes: N tokens, M heads, S rows of the table read per token, R rows of the table, U rows read at all.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.transformer import Transformer


def count_bytes(model: Transformer) -> int:
    """Return the bytes of the counts of one step's reads: int32 per row, head and layer."""
    return sum(4 * layer.heads_per_read * len(_table(layer).weight) for layer in model.memory_layers().values())


class Reads:
    """Counts the reads of every memory layer of a model from `start` to `finish`; `detach` removes its hooks.

    While it counts, it holds 4 bytes per row for each head of each layer; otherwise nothing.
    """

    def __init__(self, model: Transformer) -> None:
        self._model, self._layers = model, model.memory_layers()
        self.tables = list({id(_table(layer)): _table(layer) for layer in self._layers.values()}.values())
        self._counts: dict[int | str, Tensor] = {}
        self._reading: int | str = -1
        # Hooks stay registered, because a compiled model does not notice hooks that come and go.
        self._handles = [
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            for index, layer in self._layers.items()
        ]
        for table in self.tables:
            table.before_read.append(self._count)

    def start(self) -> None:
        """Start counting from zero."""
        device = next(self._model.parameters()).device
        self._counts = {
            index: torch.zeros(layer.heads_per_read, len(_table(layer).weight), dtype=torch.int32, device=device)
            for index, layer in self._layers.items()
        }

    def finish(self, copies: int = 1) -> dict[str, Any]:
        """Stop counting and return the measures of the reads since `start`; empty for a model without a memory.

        Args:
            copies: Processes that read the same rows, which are counted once.

        Returns:
            {"layers": {layer: measures and "head_entropy_bits", a list}, "tables": [measures, "layers" and
            "overlap"]}, tables in the order of `self.tables`. "tables" adds up the reads of all layers that share
            a table; "overlap" holds, for each pair of layers ("4-12"), the share of their reads that both have.
        """
        counts, self._counts = self._counts, {}
        for index, counts_MR in counts.items():
            _table(self._layers[index]).share_reads(counts_MR)
            counts_MR.floor_divide_(copies)
        if not counts:
            return {}
        sharing = [[index for index, layer in self._layers.items() if _table(layer) is table] for table in self.tables]
        by_layer = {index: _sum(counts_MR) for index, counts_MR in counts.items()}
        return {
            "layers": {
                str(index): {
                    **measures(by_layer[index]),
                    "head_entropy_bits": [_entropy_bits(_shares(counts_R)[1]) for counts_R in counts_MR],
                }
                for index, counts_MR in counts.items()
            },
            "tables": [
                {
                    "layers": layers,
                    **measures(_sum(torch.stack([by_layer[index] for index in layers]))),
                    "overlap": {
                        f"{one}-{other}": overlap(by_layer[one], by_layer[other])
                        for one, other in itertools.combinations(layers, 2)
                    },
                }
                for layers in sharing
            ],
        }

    def detach(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        for table in self.tables:
            table.before_read.remove(self._count)

    def _enter(self, index: int | str) -> None:
        self._reading = index

    def _count(self, indices_NS: Tensor) -> None:
        if not self._counts:
            return
        counts_MR = self._counts[self._reading]
        heads, rows = counts_MR.shape
        first_M1 = torch.arange(0, heads * rows, rows, device=indices_NS.device).unsqueeze(1)
        places_NMK = indices_NS.unflatten(1, (heads, -1)) + first_M1
        one = counts_MR.new_ones(())
        counts_MR.view(-1).index_add_(0, places_NMK.view(-1), one.expand(places_NMK.numel()))


def measures(counts_R: Tensor) -> dict[str, float]:
    """Measure counts of reads.

    Returns the number of rows and of reads, the share of rows that were read (`used`) and the number that were not
    (`dead`), the entropy of reads over rows, and their divergence from uniform use (0 to log2 rows bits).
    """
    rows, shares_U = len(counts_R), _shares(counts_R)[1]
    entropy = _entropy_bits(shares_U)
    return {
        "rows": rows,
        "reads": int(counts_R.sum()),
        "used": len(shares_U) / rows,
        "dead": rows - len(shares_U),
        "entropy_bits": entropy,
        "kl_bits": max(0.0, math.log2(rows) - entropy),
    }


def overlap(counts_R: Tensor, others_R: Tensor) -> float:
    """Return the overlap of two distributions of reads, 0 to 1: the sum of the smaller shares (Weitzman)."""
    rows_U, shares_U = _shares(counts_R)
    return float(torch.minimum(shares_U, others_R[rows_U].double() / others_R.sum()).sum())


def _sum(counts_XR: Tensor) -> Tensor:
    # By default torch sums int32 into int64, at twenty times the cost.
    return counts_XR.sum(0, dtype=torch.int32)


def _entropy_bits(shares_U: Tensor) -> float:
    return max(0.0, -float((shares_U * shares_U.log2()).sum()))


def _shares(counts_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that were read, ascending, and their shares of the reads in float64."""
    is_read_R = counts_R.ne(0)
    if is_read_R.is_cuda:
        rows_U = is_read_R.nonzero().squeeze(1)
    else:  # three times faster than torch's on CPU
        rows_U = torch.from_numpy(np.flatnonzero(is_read_R.numpy()))
    read_U = counts_R.index_select(0, rows_U).double()
    return rows_U, read_U / read_U.sum()


def _table(layer: MemoryLayer) -> MemoryTable:
    """Return the table by which a layer is counted; if it has several, it reads the same rows of all."""
    return layer.tables[0]
