"""Batches by step number, from one global, seeded order of rows over memory-mapped shards.

The rows of a run are one endless stream: epoch after epoch, each in an order that is a function of the loader's seed
and the number of the epoch. Step s consists of rows [s B, (s + 1) B), where B = batch_rows. The rows of a step do not
depend on the number of processes, and resuming needs only the step's number.

Shapes: B rows, T = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from suite.data.packing import Packing, stream_rows


@dataclass(frozen=True)
class Batch:
    """int64 [B, T] each: input tokens, targets (IGNORED: not scored), and the document that a token belongs to.

    Tokens of a row with the same segment number are one document, or the padding at the end; attention stays within it.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    segments_BT: torch.Tensor


class Loader:
    """Batches by step number. `rows_per_epoch` rows are one epoch; for `bios` an epoch is one exposure."""

    def __init__(self, packing: Packing, batch_rows: int) -> None:
        self._packing = packing
        self.batch_rows = batch_rows
        self.rows_per_epoch = packing.rows_per_epoch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Read the share of one process in a step: its rows [rank, rank + 1) * batch_rows / world_size.

        Args:
            step: The step, from 0.
            rank: The number of the process.
            world_size: Number of processes.

        Raises:
            ValueError: The number of processes does not divide the rows.
        """
        if self.batch_rows % world_size or not 0 <= rank < world_size:
            raise ValueError(f"{self.batch_rows} rows cannot be divided: rank {rank} of {world_size}")
        share = self.batch_rows // world_size
        begin = step * self.batch_rows + rank * share
        return Batch(*(torch.from_numpy(column) for column in stream_rows(self._packing, begin, begin + share)))

    def epoch_at(self, step: int) -> float:
        """Return the epochs read before step `step`."""
        return step * self.batch_rows / self.rows_per_epoch
