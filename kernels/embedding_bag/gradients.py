"""The buffer between a table's backward passes and its optimizer: gradients of the rows that were read.

Shapes: R table rows, D width, N bags, S rows read per bag, U unique rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.embedding_bag import reference
from kernels.embedding_bag.reference import Groups


class RowGradients:
    """Compact gradients of one table, summed over the layers that share it and over micro-batches.

    Holds int64 row ids and float32 sums (float64 for a float64 table), never a table-sized tensor. Sums are
    taken in the order of `add`, as autograd sums into a dense gradient: bit for bit the same.
    """

    def __init__(self, table_RD: Tensor) -> None:
        self.table_rows, self.width = table_RD.shape
        self.dtype = reference.accumulator(table_RD.dtype)
        self.device = table_RD.device
        native = dispatch.choose(table_RD, native_takes=table_RD.is_contiguous()) == "native"
        self._group_by_row = dispatch.module("embedding_bag", "native" if native else "torch").group_by_row
        self._rows: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._last: tuple[Tensor, Groups] | None = None

    def groups(self, indices_NS: Tensor) -> Groups:
        """The lookups grouped by row; asked again with the same tensor object, nothing is computed."""
        if self._last is None or self._last[0] is not indices_NS:
            self._last = (indices_NS, self._group_by_row(indices_NS, self.table_rows))
        return self._last[1]

    def add(self, rows_U: Tensor, sums_UD: Tensor) -> None:
        """Take over one backward pass's gradients: rows ascending without repeats, sums in `self.dtype`."""
        if rows_U.numel() == 0:
            return
        self._rows.append(rows_U)
        self._sums.append(sums_UD)
        if len(self._rows) > 1 and sum(map(len, self._rows)) > 2 * self.table_rows:
            self.merged()

    def merged(self) -> tuple[Tensor, Tensor]:
        """(rows_U int64 ascending without repeats, sums_UD); the sums are the buffer's own: edits stay."""
        if len(self._rows) > 1:
            groups = self._group_by_row(torch.cat(self._rows), self.table_rows)
            self._rows, self._sums = [groups.rows_U], [reference.sum_pieces(self._sums, groups)]
        if self._rows:
            return self._rows[0], self._sums[0]
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return empty, torch.zeros(0, self.width, dtype=self.dtype, device=self.device)

    def norm(self) -> Tensor:
        """The exact global 2-norm (rows not read have no gradient), a 0-dim tensor."""
        return torch.linalg.vector_norm(self.merged()[1])

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradients in place."""
        self.merged()[1].mul_(factor)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale to a global norm of at most `max_norm` as torch's clip_grad_norm_ does; gives the norm before."""
        norm = self.norm()
        factor = max_norm / (norm + 1e-6)
        if not factor >= 1.0:  # a norm of NaN must show
            self.scale_(factor)
        return norm

    def clear(self) -> None:
        """Forget all gradients and the cached grouping."""
        self._rows, self._sums, self._last = [], [], None
