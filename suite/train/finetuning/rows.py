"""The rows that a step trains: the best of those that it reads, by TF-IDF, by reads, or at random.

A row's score is c_i / sum_j c_j * log((|B| + 1) / (d_i + 1)): c_i are the reads of row i by the real tokens of the
step, and d_i is the number of the |B| background batches in which row i is read (sparse memory finetuning, arXiv
2510.15103, section 3). Reads of padding do not count. Rows that are read and not chosen still take part in the forward
pass.

Shapes: N tokens of a micro-batch, S rows read per token, R rows of a table, U rows read at all, K rows chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from kernels.embedding_bag import RowGradients
from kernels.row_adamw import noise
from suite.data import seeded_random
from suite.data.loader import Batch
from suite.data.packing import IGNORED
from suite.errors import UserError
from suite.inference.batching import evaluation_mode
from suite.models.moe import Experts, TokenChoice
from suite.models.transformer import Transformer
from suite.trainable import TrainRows


class ReadCounts:
    """Counts the reads of every row by real tokens, of tables and of experts that tokens choose."""

    def __init__(self, model: Transformer) -> None:
        self.rows: dict[str, Tensor] = {}
        self._real_N: Tensor | None = None
        for name, (listeners, count, device) in _sources(model).items():
            self.rows[name] = torch.zeros(count, dtype=torch.int64, device=device)
            listeners.append(partial(self._count, name))

    def clear(self) -> None:
        """Set all counts to zero."""
        for counts_R in self.rows.values():
            counts_R.zero_()

    def start(self, targets_BT: Tensor) -> None:
        """Count the reads of the positions with a target in the forward passes that follow, until `stop`."""
        self._real_N = (targets_BT != IGNORED).flatten()

    def stop(self) -> None:
        """Stop counting."""
        self._real_N = None

    def _count(self, name: str, indices_NS: Tensor) -> None:
        if self._real_N is None:
            return
        tokens = len(self._real_N)
        assert indices_NS.numel() % tokens == 0, "reads are ordered by token"
        counts_R = self.rows[name]
        read_NS = indices_NS.reshape(tokens, -1).to(counts_R.device)
        # Reads of padding count zero times. Without their indices the host would have to know how many there are.
        times_NS = self._real_N.to(counts_R.device).long().unsqueeze(1).expand_as(read_NS)
        counts_R.index_add_(0, read_NS.flatten(), times_NS.flatten())


def _sources(model: Transformer) -> dict[str, tuple[list[Callable[[Tensor], None]], int, torch.device]]:
    """Return what has rows, by name: the functions called before a read, the number of rows, and the device."""
    sources = {
        f"tables.{number}": (table.before_read, len(table.weight), table.weight.device)
        for number, table in enumerate(model.memory_tables())
    }
    for path, experts in expert_stacks(model).items():
        sources[path] = (experts.before_read, experts.count, experts.w1.device)
    return sources


def expert_stacks(model: Transformer) -> dict[str, Experts]:
    """Return the experts that tokens choose, by path. Where experts choose tokens, each reads equally many."""
    return {
        f"{path}.experts": module.experts for path, module in model.named_modules() if isinstance(module, TokenChoice)
    }


class RowChoice:
    """Chooses the rows of a step from its reads, and drops the gradients of all others.

    Args:
        model: The model.
        config: The number of rows and their score.
        seed: Seed of the score `random`.
    """

    def __init__(self, model: Transformer, config: TrainRows, seed: int) -> None:
        self.config, self.seed, self.step = config, seed, 0
        self.counts = ReadCounts(model)
        if not self.counts.rows:
            raise UserError(
                f"train.trainable.kind: got 'rows', allowed: all, lora, parameters for {model.config.family}, which has"
                " neither tables nor experts that tokens choose"
            )
        self.background = {name: torch.zeros_like(counts_R) for name, counts_R in self.counts.rows.items()}

    def count_background(self, model: Transformer, batches: Iterable[Batch]) -> None:
        """Count in how many of the batches each row is read, with the model as it is, in evaluation mode."""
        with evaluation_mode(model) as device:
            for batch in batches:
                self.counts.clear()
                self.counts.start(batch.targets_BT.to(device))
                model.hidden(batch.tokens_BT.to(device), batch.segments_BT.to(device))
                self.counts.stop()
                for name, counts_R in self.counts.rows.items():
                    self.background[name] += counts_R > 0
        self.counts.clear()

    def begin(self, step: int) -> None:
        """Start counting the reads of a step."""
        self.step = step
        self.counts.clear()

    def is_chosen(self, name: str) -> Tensor:
        """Return which rows of a table to train, bool [R]. Does not wait for a device."""
        counts_R = self.counts.rows[name]
        is_read_R = counts_R > 0
        if self.config.score == "reads":
            return is_read_R
        # On a device, which alone knows the rows that were read, all rows are ranked, those not read last.
        every_R = torch.arange(len(counts_R), device=counts_R.device)
        rows_U = every_R if counts_R.is_cuda else every_R[is_read_R]
        scores_U = self._scores(name, rows_U).masked_fill(~is_read_R[rows_U], -torch.inf)
        best_K = rows_U[scores_U.argsort(descending=True, stable=True)[: self.config.top]]
        return torch.zeros_like(is_read_R).index_fill_(0, best_K, True).logical_and_(is_read_R)

    def _scores(self, name: str, rows_U: Tensor) -> Tensor:
        """Return the scores of some rows of a table, float64 [U]."""
        if self.config.score == "random":
            # Without the table's name: the two tables of a PEER layer are read at the same rows.
            key = int(seeded_random.raw(1, self.seed, self.step)[0]) & noise.MASK
            return noise.mixed(noise.mixed(rows_U) ^ key).double()
        counts_R = self.counts.rows[name]
        scores_U = counts_R[rows_U].double() / counts_R.sum()
        if self.config.score == "tfidf":
            documents_U = self.background[name][rows_U].double()
            scores_U = scores_U * torch.log((self.config.background + 1) / (documents_U + 1))
        return scores_U

    def keep(self, parameter: str, gradients: RowGradients) -> None:
        """Drop the gradients of a parameter's rows that are not chosen."""
        gradients.keep(self.is_chosen(parameter.rpartition(".")[0]))
