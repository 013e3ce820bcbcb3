"""Training with value tables in host memory, where the device has no room for them.

The table, its moments and its row-wise optimizer stay in host memory. Each read copies its distinct rows to the device;
the backward pass copies their gradients back. The values that are read, the sums of gradients and their order are those
of a table on the device: on a CPU training is equal bit for bit.

A layer's rows depend on its input, so the host waits once for the rows of every layer that reads. Tables read at the
same rows share that wait. Gradients are copied without waiting: they have arrived when the host has waited for the next
read, or at the latest when it waits for them, once a step.

Shapes: N tokens, S rows read per token, L = N * S lookups, R rows of the table, U distinct rows of a read, D row width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.embedding_bag import RowGradients
from suite.models.memory_table import MemoryTable, Readable, copied_rows
from suite.models.transformer import Transformer


def move_all_but_tables(model: Transformer, device: torch.device) -> None:
    """Move a model to a device, except for the rows of its tables, which reads copy from now on."""
    weights = [table.weight for table in model.memory_tables()]
    for table in model.memory_tables():
        del table.weight
    model.to(device)
    transfers = Transfers()
    for table, weight in zip(model.memory_tables(), weights, strict=True):
        table.weight = weight
        table.host = CopiedRows(table, transfers)


class Transfers:
    """What travels between the device and the tables of a model in host memory."""

    def __init__(self) -> None:
        self._read: tuple[Tensor, Tensor, Tensor] | None = None
        self._gradients: list[tuple[RowGradients, Tensor, Tensor]] = []
        self._is_sending = False

    def distinct(self, indices_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct rows of a read, ascending, in host memory, and their numbers at each lookup, [N, S].

        Waits for the device, unless the last call had the same tensor object.
        """
        if self._read is None or self._read[0] is not indices_NS:
            self._read = (indices_NS, *_distinct(indices_NS))
            self._add_gradients()
        return self._read[1:]

    def send(self, gradients: RowGradients, rows_U: Tensor, sums_UD: Tensor) -> None:
        """Start to copy gradients of rows to host memory, where they are added to those of their table."""
        if sums_UD.is_cuda:
            sent_UD, self._is_sending = sums_UD, True
            sums_UD = torch.empty(sent_UD.shape, dtype=sent_UD.dtype, pin_memory=True)
            sums_UD.copy_(sent_UD, non_blocking=True)
        self._gradients.append((gradients, rows_U, sums_UD))

    def receive(self) -> None:
        """Wait for the gradients that were sent and have not been added."""
        if self._is_sending:
            torch.cuda.current_stream().synchronize()
        self._read = None
        self._add_gradients()

    def _add_gradients(self) -> None:
        """Add the gradients that were sent before the host has waited."""
        self._is_sending = False
        for gradients, rows_U, sums_UD in self._gradients:
            gradients.add(rows_U, sums_UD)
        self._gradients.clear()


def _distinct(indices_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `torch.unique` does, with the distinct rows in host memory.

    On a GPU torch.unique waits for their number, and the copy would wait again. Here they are copied in as many places
    as there are lookups, together with their number.
    """
    if not indices_NS.is_cuda:
        return indices_NS.unique(return_inverse=True)
    sorted_L, order_L = indices_NS.flatten().sort(stable=True)
    is_new_L = torch.ones_like(sorted_L)
    is_new_L[1:] = sorted_L[1:] != sorted_L[:-1]
    number_L = is_new_L.cumsum(0) - 1
    rows_L = torch.zeros_like(sorted_L).scatter_(0, number_L, sorted_L)
    numbers_NS = torch.empty_like(sorted_L).scatter_(0, order_L, number_L).view_as(indices_NS)
    places = torch.cat((rows_L, is_new_L.sum().view(1))).cpu()
    return places[: int(places[-1])], numbers_NS


class CopiedRows:
    """Copies of the rows of a table, whose weight is in host memory.

    Functions in `before_copy` are called with the distinct rows of a read, int64 [U] in host memory and ascending,
    before they are copied. The row-wise optimizer brings them up to date.
    """

    def __init__(self, table: MemoryTable, transfers: Transfers) -> None:
        self.table, self.transfers = table, transfers
        self.before_copy: list[Callable[[Tensor], None]] = []

    def copied(self, indices_NS: Tensor) -> Readable:
        """Return a copy of the distinct rows of a read, on the device of `indices_NS`."""
        weight_RD, gradients = self.table.weight, self.table.gradients
        rows_U, numbers_NS = self.transfers.distinct(indices_NS)
        for listener in self.before_copy:
            listener(rows_U)
        rows_UD = copied_rows(weight_RD.detach(), rows_U, indices_NS.device)
        rows_UD.requires_grad_(torch.is_grad_enabled() and weight_RD.requires_grad)
        assert gradients is not None or not rows_UD.requires_grad, "a row-wise optimizer trains a table in host memory"
        if gradients is None:
            return Readable(rows_UD, numbers_NS, None)
        return Readable(rows_UD, numbers_NS, _CopiedGradients(rows_UD, rows_U, gradients, self.transfers))

    def receive_gradients(self) -> None:
        """Wait until the table has all gradients of the backward passes so far."""
        self.transfers.receive()


class _CopiedGradients(RowGradients):
    """The gradients of copied rows: each backward pass sends them to those of the table, in host memory.

    Args:
        rows_UD: The copies.
        rows_U: Their numbers in the table, in host memory.
        of_table: The gradients of the table.
        transfers: What sends them.
    """

    def __init__(self, rows_UD: Tensor, rows_U: Tensor, of_table: RowGradients, transfers: Transfers) -> None:
        super().__init__(rows_UD)
        self.rows_U, self.of_table, self.transfers = rows_U, of_table, transfers

    def add_row_sums(self, source_ND: Tensor, weights_NS: Tensor, groups: Any, ops: ModuleType) -> None:
        """Send one backward pass's gradients to those of the table; arguments as of the base class."""
        super().add_row_sums(source_ND, weights_NS, groups, ops)
        sums_UD = self._all_sums()
        self.clear()
        assert len(sums_UD) == len(self.rows_U), "every copied row has been read"
        self.transfers.send(self.of_table, self.rows_U, sums_UD)
