"""The micro-batches of one process, step after step, on its device.

On a GPU, a thread reads the next step's rows into pinned memory while the current step runs, and the copy does not stop
the host. Tokens, targets and segments are copied together, as int32.

Shapes: B rows, T positions, M documents and places for documents.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from suite.data.loader import Batch, Loader
from suite.data.packing import IGNORED
from suite.models.document_attention import Documents, offsets_of
from suite.train.parallel import World


class MicroBatch(NamedTuple):
    """int64 [B, T] on the device; `documents` on a GPU."""

    tokens_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    documents: Documents | None


class Step(NamedTuple):
    """The micro-batches of a step in host memory, pinned on a GPU, and their number of targets."""

    columns: list[tuple[Tensor, Tensor]]
    targets: int


class Batches:
    """Reads this process's micro-batches of any step; reading steps in order is fast.

    Args:
        loader: The rows.
        world: The processes that share a step.
        parts: Micro-batches per step.
    """

    def __init__(self, loader: Loader, world: World, parts: int) -> None:
        self._loader, self._world, self._parts, self._device = loader, world, parts, world.device
        self._reader = ThreadPoolExecutor(1, "batches") if self._device.type == "cuda" else None
        self._next: tuple[int, Future[Step]] | None = None

    def read(self, step: int) -> tuple[list[MicroBatch], int]:
        """Return the micro-batches of a step, and this process's number of targets in them."""
        if self._reader is None:
            batches = self._batches(step)
            columns = [MicroBatch(part.tokens_BT, part.targets_BT, part.segments_BT, None) for part in batches]
            return columns, _targets(batches)
        ahead, self._next = self._next, None
        ready = ahead[1].result() if ahead is not None and ahead[0] == step else self._pinned(step)
        self._next = (step + 1, self._reader.submit(self._pinned, step + 1))
        return [self._on_device(*columns) for columns in ready.columns], ready.targets

    def _batches(self, step: int) -> list[Batch]:
        rank, size, parts = self._world.rank, self._world.size, self._parts
        return [self._loader.batch(step, micro * size + rank, parts * size) for micro in range(parts)]

    def _pinned(self, step: int) -> Step:
        batches, columns = self._batches(step), []
        for batch in batches:
            stacked_3BT = torch.stack((batch.tokens_BT, batch.targets_BT, batch.segments_BT)).int()
            columns.append((stacked_3BT.pin_memory(), offsets_of(batch.segments_BT).pin_memory()))
        return Step(columns, _targets(batches))

    def _on_device(self, stacked_3BT: Tensor, offsets_M: Tensor) -> MicroBatch:
        tokens_BT, targets_BT, segments_BT = stacked_3BT.to(self._device, non_blocking=True).long().unbind()
        documents = Documents(offsets_M.to(self._device, non_blocking=True), tokens_BT.shape[1])
        return MicroBatch(tokens_BT, targets_BT, segments_BT, documents)


def _targets(batches: list[Batch]) -> int:
    return sum(int((batch.targets_BT != IGNORED).sum()) for batch in batches)
