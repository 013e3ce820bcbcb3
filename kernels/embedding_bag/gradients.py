"""The gradients of the rows that were read, between a table's backward passes and its optimizer.

Shapes: R table rows, D width, N bags, S rows read per bag, U unique rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.embedding_bag import reference
from kernels.embedding_bag.reference import Groups

MOSTLY = 0.5
"""From this share of the rows on, a device sums the gradients in a buffer of the whole table, in place."""


class Placed(NamedTuple):
    """Gradients where they are: that of rows_U[u] is scale * sums[slots_U[u]] (None: scale 1, slot u)."""

    rows_U: Tensor
    sums: Tensor
    slots_U: Tensor | None
    scale: Tensor | None


class RowGradients:
    """Compact gradients of one table, summed over the layers that share it and over micro-batches.

    Holds int64 row ids and float32 sums (float64 for a float64 table). Sums are taken in the order of the backward
    passes, as autograd sums into a dense gradient: bit for bit the same. On a GPU, once a backward pass reads most of
    the rows, it and all later ones add to one buffer of the whole table instead of being merged at the end.

    A factor of `scale_` is kept until the gradients are next needed: an optimizer that takes them `placed` applies it
    as it reads them, and saves a pass over them.
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
        self._scale: Tensor | None = None
        self._whole_RD: Tensor | None = None
        self._is_read_R: Tensor | None = None

    def groups(self, indices_NS: Tensor) -> Groups:
        """Return the lookups grouped by row; a second call with the same tensor object returns the cached groups."""
        if self._last is None or self._last[0] is not indices_NS:
            self._last = (indices_NS, self._group_by_row(indices_NS, self.table_rows))
        return self._last[1]

    def add_row_sums(self, source_ND: Tensor, weights_NS: Tensor, groups: Groups, ops: ModuleType) -> None:
        """Add one backward pass's gradients: per row, the sum of weight x source over its lookups.

        Args:
            source_ND: The output's gradient, or whatever the weights multiply.
            weights_NS: The factor of every lookup.
            groups: The lookups grouped by row.
            ops: The implementation of `row_sums`.
        """
        self._apply_scale()
        reads_most = len(groups.rows_U) >= MOSTLY * self.table_rows
        if hasattr(ops, "add_row_sums") and (self._whole_RD is not None or reads_most):
            whole_RD, is_read_R = self._whole()
            ops.add_row_sums(source_ND, weights_NS, groups, whole_RD)
            is_read_R.index_fill_(0, groups.rows_U, True)
        else:
            self.add(groups.rows_U, ops.row_sums(source_ND, weights_NS, groups, self.dtype))

    def add(self, rows_U: Tensor, sums_UD: Tensor) -> None:
        """Add one backward pass's gradients, without a copy: rows ascending and unique, sums in `self.dtype`."""
        if rows_U.numel() == 0:
            return
        self._apply_scale()
        self._rows.append(rows_U)
        self._sums.append(sums_UD)
        if len(self._rows) > 1 and sum(map(len, self._rows)) > 2 * self.table_rows:
            self.merged()

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return (rows_U int64, ascending and unique; sums_UD). The sums are the buffer itself: writes to them
        persist."""
        self._apply_scale()
        if self._whole_RD is not None:
            rows_U, sums_RD, *_ = self.placed()
            self.clear()
            self._rows, self._sums = [rows_U], [sums_RD[rows_U]]
        if len(self._rows) > 1:
            groups = self._group_by_row(torch.cat(self._rows), self.table_rows)
            self._rows, self._sums = [groups.rows_U], [reference.sum_pieces(self._sums, groups)]
        if self._rows:
            return self._rows[0], self._sums[0]
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return empty, torch.zeros(0, self.width, dtype=self.dtype, device=self.device)

    def placed(self) -> Placed:
        """Return the gradients without a copy of them, for an optimizer that can read them so."""
        if self._whole_RD is not None:
            whole_RD, is_read_R = self._whole()
            rows_U = is_read_R.nonzero().squeeze(1)
            return Placed(rows_U, whole_RD, rows_U, self._scale)
        scale, self._scale = self._scale, None
        rows_U, sums_UD = self.merged()
        self._scale = scale
        return Placed(rows_U, sums_UD, None, scale)

    def is_read(self) -> Tensor:
        """Return which rows of the table have a gradient, bool [R]."""
        if self._whole_RD is not None:
            return self._whole()[1].clone()
        is_read_R = torch.zeros(self.table_rows, dtype=torch.bool, device=self.device)
        return is_read_R.index_fill_(0, self.merged()[0], True)

    def spread(self, rows_V: Tensor) -> Tensor:
        """Give a gradient of zero to those of some rows that have none yet.

        Replicas of a table call it with the same rows, to sum their gradients in place.

        Args:
            rows_V: int64 rows, ascending and unique; every row that has a gradient is one of them.

        Returns:
            The buffer of all sums, laid out by `rows_V` and the table's size alone: [V, D], or the whole table.
        """
        self._apply_scale()
        if len(rows_V) >= MOSTLY * self.table_rows:
            whole_RD, is_read_R = self._whole()
            is_read_R.index_fill_(0, rows_V, True)
            return whole_RD
        assert self._whole_RD is None
        rows_U, sums_UD = self.merged()
        spread_VD = sums_UD.new_zeros(len(rows_V), self.width)
        spread_VD[torch.searchsorted(rows_V, rows_U)] = sums_UD
        self._rows, self._sums = [rows_V], [spread_VD]
        return spread_VD

    def norm(self) -> Tensor:
        """Return the exact global 2-norm (rows not read have no gradient), a 0-dim tensor."""
        self._apply_scale()
        return torch.linalg.vector_norm(self.merged()[1] if self._whole_RD is None else self._whole()[0])

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradients by a factor, applied lazily: when they are next read."""
        self._apply_scale()
        self._scale = torch.as_tensor(factor, dtype=self.dtype, device=self.device)

    def _apply_scale(self) -> None:
        if self._scale is not None:
            scale, self._scale = self._scale, None
            (self.merged()[1] if self._whole_RD is None else self._whole()[0]).mul_(scale)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale to a global norm of at most `max_norm`, as torch's clip_grad_norm_ does; returns the norm before."""
        norm = self.norm()
        factor = max_norm / (norm + 1e-6)
        if not factor >= 1.0:  # also if the norm is NaN, which must not be hidden
            self.scale_(factor)
        return norm

    def clear(self) -> None:
        """Drop all gradients and the cached grouping."""
        self._rows, self._sums, self._last = [], [], None
        self._scale = self._whole_RD = self._is_read_R = None

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Return the buffer of the whole table and which rows were read; what was compact so far is moved there."""
        if self._whole_RD is None or self._is_read_R is None or self._rows:
            pieces = list(zip(self._rows, self._sums, strict=True))
            self._rows, self._sums = [], []
            if self._whole_RD is None or self._is_read_R is None:
                self._whole_RD = torch.zeros(self.table_rows, self.width, dtype=self.dtype, device=self.device)
                self._is_read_R = torch.zeros(self.table_rows, dtype=torch.bool, device=self.device)
            for rows_U, sums_UD in pieces:
                self._whole_RD.index_add_(0, rows_U, sums_UD)  # every row once: the order is fixed
                self._is_read_R.index_fill_(0, rows_U, True)
        return self._whole_RD, self._is_read_R
