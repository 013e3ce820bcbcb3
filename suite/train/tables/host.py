"""Training with value tables in host memory, where the device has no room for them.

The table, its moments and its row-wise optimizer stay in host memory. Each read copies its distinct rows to the device;
the backward pass copies their gradients back. The values that are read, the sums of gradients and their order are those
of a table on the device: on a CPU training is equal bit for bit.

Shapes: N tokens, S rows read per token, U distinct rows of a read, D row width.
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
    for table, weight in zip(model.memory_tables(), weights, strict=True):
        table.weight = weight
        table.host = CopiedRows(table)


class CopiedRows:
    """Copies of the rows of a table, whose weight is in host memory.

    Functions in `before_copy` are called with the distinct rows of a read, int64 [U] in host memory and ascending,
    before they are copied. The row-wise optimizer brings them up to date.
    """

    def __init__(self, table: MemoryTable) -> None:
        self.table = table
        self.before_copy: list[Callable[[Tensor], None]] = []

    def copied(self, indices_NS: Tensor) -> Readable:
        """Return a copy of the distinct rows of a read, on the device of `indices_NS`."""
        weight_RD, gradients = self.table.weight, self.table.gradients
        rows_U, numbers_NS = indices_NS.unique(return_inverse=True)
        rows_U = rows_U.cpu()
        for listener in self.before_copy:
            listener(rows_U)
        rows_UD = copied_rows(weight_RD.detach(), rows_U, indices_NS.device)
        rows_UD.requires_grad_(torch.is_grad_enabled() and weight_RD.requires_grad)
        assert gradients is not None or not rows_UD.requires_grad, "a row-wise optimizer trains a table in host memory"
        return Readable(
            rows_UD, numbers_NS, None if gradients is None else _CopiedGradients(rows_UD, rows_U, gradients)
        )


class _CopiedGradients(RowGradients):
    """The gradients of copied rows: each backward pass adds them to those of the table, in host memory.

    Args:
        rows_UD: The copies.
        rows_U: Their numbers in the table, in host memory.
        of_table: The gradients of the table.
    """

    def __init__(self, rows_UD: Tensor, rows_U: Tensor, of_table: RowGradients) -> None:
        super().__init__(rows_UD)
        self.rows_U, self.of_table = rows_U, of_table

    def add_row_sums(self, source_ND: Tensor, weights_NS: Tensor, groups: Any, ops: ModuleType) -> None:
        """Add one backward pass's gradients to those of the table; arguments as of the base class."""
        super().add_row_sums(source_ND, weights_NS, groups, ops)
        sums_UD = self._all_sums()
        self.clear()
        assert len(sums_UD) == len(self.rows_U), "every copied row has been read"
        self.of_table.add(self.rows_U, sums_UD.to(self.rows_U.device))
