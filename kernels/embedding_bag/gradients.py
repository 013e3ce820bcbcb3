"""The gradients of the rows that were read, between a table's backward passes and its optimizer.

Shapes: R table rows, D width, N bags, S rows read per bag, U unique rows, P places for unique rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.embedding_bag import reference

MOSTLY = 0.5
"""From this many lookups per row on, a device sums the gradients in a buffer of the whole table, in place."""


class Placed(NamedTuple):
    """Gradients where they are, on a device: `scale` (None: 1) times the sums.

    Either sums of the whole table, with a flag for every row that was read, or those of rows_P, which holds R in unused
    places.
    """

    rows_P: Tensor | None
    sums: Tensor
    is_read_R: Tensor | None
    scale: Tensor | None


class LatestGroups:
    """The latest lookups, grouped by row. Tables that are read at the same rows share it, and group them once."""

    def __init__(self) -> None:
        self._indices: Tensor | None = None
        self._of: tuple[ModuleType, int] | None = None
        self._groups: Any = None

    def of(self, indices_NS: Tensor, ops: ModuleType, table_rows: int) -> Any:
        """Return the lookups of a table of `table_rows` grouped by `ops`: those of the call before for the same tensor
        object."""
        if self._indices is not indices_NS or self._of != (ops, table_rows):
            self._groups = ops.group_by_row(indices_NS, table_rows)
            self._indices, self._of = indices_NS, (ops, table_rows)
        return self._groups

    def clear(self) -> None:
        """Release the lookups."""
        self._indices = self._of = self._groups = None


class RowGradients:
    """Compact gradients of one table, summed over the layers that share it and over micro-batches.

    Holds int64 row ids and float32 sums (float64 for a float64 table). Sums are taken in the order of the backward
    passes, as autograd sums into a dense gradient: bit for bit the same. On a GPU, once a step has made half as many
    lookups as the table has rows, they are summed in one buffer of the whole table instead of being merged at the end.

    The Triton kernels leave the number of rows that were read on the device: rows and sums then have unused places
    (`kernels.embedding_bag.triton.row_sums`), and only `merged` waits for that number.

    A factor of `scale_` is kept until the gradients are next needed: an optimizer that takes them `placed` applies it
    as it reads them, and saves a pass over them.

    Args:
        table_RD: The table.
        groups: What other tables that are read at the same rows use too; None: of this table alone.
    """

    def __init__(self, table_RD: Tensor, groups: LatestGroups | None = None) -> None:
        self.table_rows, self.width = table_RD.shape
        self.dtype = reference.accumulator(table_RD.dtype)
        self.device = table_RD.device
        backend = dispatch.choose(table_RD, native_takes=table_RD.is_contiguous())
        self._ops = dispatch.module("embedding_bag", backend)
        self._host_ops = self._ops if backend == "native" else reference
        self._rows: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._lookups = 0
        self._has_places = False
        self._groups = LatestGroups() if groups is None else groups
        self._scale: Tensor | None = None
        self._whole_RD: Tensor | None = None
        self._is_read_R: Tensor | None = None

    @property
    def leaves_counts(self) -> bool:
        """Whether the number of rows that were read stays on the device, where `merged` waits and `placed` does not."""
        return _leaves_counts(self._ops)

    @property
    def _leaves_places(self) -> bool:
        """Whether rows may have unused places, because the host does not know how many were read."""
        return self._has_places or self.leaves_counts

    def groups(self, indices_NS: Tensor, ops: ModuleType | None = None) -> Any:
        """Return the lookups grouped by row, as `ops` groups them (by default, those for the table's device).

        A second call with the same tensor object, of any table that shares them, returns the groups of the first.
        """
        ops = self._ops if ops is None else ops
        if not _leaves_counts(ops):
            ops = self._host_ops  # equal groups, found faster
        return self._groups.of(indices_NS, ops, self.table_rows)

    def add_row_sums(self, source_ND: Tensor, weights_NS: Tensor, groups: Any, ops: ModuleType) -> None:
        """Add one backward pass's gradients: per row, the sum of weight x source over its lookups.

        Args:
            source_ND: The output's gradient, or whatever the weights multiply.
            weights_NS: The factor of every lookup.
            groups: The lookups grouped by row by `ops`.
            ops: The implementation of `row_sums`.
        """
        self._apply_scale()
        if not _leaves_counts(ops):
            self.add(groups.rows_U, ops.row_sums(source_ND, weights_NS, groups, self.dtype))
            return
        self._lookups += len(groups.order_L)
        if self._whole_RD is not None or self._lookups >= MOSTLY * self.table_rows:
            whole_RD, is_read_R = self._whole()
            ops.add_row_sums(source_ND, weights_NS, groups, whole_RD, is_read_R)
        elif len(groups.order_L):
            rows_P, sums_PD = ops.row_sums(source_ND, weights_NS, groups, self.dtype)
            self._rows.append(rows_P)
            self._sums.append(sums_PD)
            self._has_places = True

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
        persist. Waits for a device."""
        self._apply_scale()
        if self._whole_RD is not None:
            whole_RD, is_read_R = self._whole()
            rows_U = is_read_R.nonzero().squeeze(1)
            self.clear()
            self._rows, self._sums = [rows_U], [whole_RD[rows_U]]
        elif self._has_places:
            rows_P, sums_PD = self._in_places()
            used = int((rows_P < self.table_rows).sum())
            self._rows, self._sums, self._has_places = [rows_P[:used]], [sums_PD[:used]], False
        if len(self._rows) > 1:
            groups = self._host_ops.group_by_row(torch.cat(self._rows), self.table_rows)
            self._rows, self._sums = [groups.rows_U], [reference.sum_pieces(self._sums, groups)]
        if self._rows:
            return self._rows[0], self._sums[0]
        return self._nothing()

    def placed(self) -> Placed:
        """Return the gradients without a copy of them and without waiting, for an optimizer that can read them so."""
        if self._whole_RD is not None:
            whole_RD, is_read_R = self._whole()
            return Placed(None, whole_RD, is_read_R, self._scale)
        return Placed(*self._in_places(), None, self._scale)

    def is_read(self) -> Tensor:
        """Return which rows of the table have a gradient, bool [R]. Does not wait for a device."""
        if self._whole_RD is not None:
            return self._whole()[1].clone()
        rows_P = self._in_places()[0] if self._leaves_places else self.merged()[0]
        is_read_R = torch.zeros(self.table_rows + 1, dtype=torch.bool, device=self.device)
        return is_read_R.index_fill_(0, rows_P, True)[:-1]

    def keep(self, is_kept_R: Tensor) -> None:
        """Drop the gradients of all rows but those flagged in `is_kept_R`, bool [R]. Does not wait for a device."""
        self._apply_scale()
        if self._whole_RD is not None:
            whole_RD, is_read_R = self._whole()
            whole_RD.masked_fill_(~is_kept_R.unsqueeze(1), 0)
            is_read_R.logical_and_(is_kept_R)
        elif self._leaves_places:
            rows_P, sums_PD = self._in_places()
            is_kept_P = torch.cat((is_kept_R, is_kept_R.new_zeros(1)))[rows_P]
            order_P = (~is_kept_P).to(torch.uint8).argsort(stable=True)  # unused places come last
            rows_P = rows_P.masked_fill(~is_kept_P, self.table_rows)[order_P]
            sums_PD = sums_PD[order_P].masked_fill_(~is_kept_P[order_P].unsqueeze(1), 0)
            self._rows, self._sums, self._has_places = [rows_P], [sums_PD], True
        else:
            rows_U, sums_UD = self.merged()
            is_kept_U = is_kept_R[rows_U]
            self.clear()
            self.add(rows_U[is_kept_U], sums_UD[is_kept_U])

    def rows_to_share(self, is_read_R: Tensor, replicas: int) -> Tensor:
        """Return the rows of which replicas that make equally many lookups have gradients.

        Args:
            is_read_R: bool [R], whether any replica has a gradient of the row.
            replicas: Number of replicas.

        Returns:
            int64, ascending. On a device that knows their number alone, there are places for as many as all lookups
            could read, and unused places hold R.
        """
        if self._whole_RD is None and not self._leaves_places:
            return is_read_R.nonzero().squeeze(1)
        room = min(self.table_rows, replicas * self._lookups)
        return torch.nonzero_static(is_read_R, size=room, fill_value=self.table_rows).squeeze(1)

    def spread(self, rows_V: Tensor) -> Tensor:
        """Give a gradient of zero to those of some rows that have none yet.

        Replicas of a table call it with the same rows, to sum their gradients in place.

        Args:
            rows_V: As returned by `rows_to_share`; every row that has a gradient is one of them.

        Returns:
            The buffer of all sums, laid out by `rows_V` and the table's size alone: [V, D], or the whole table.
        """
        self._apply_scale()
        if len(rows_V) >= MOSTLY * self.table_rows:
            whole_RD, _ = self._whole()
            assert self._is_read_R is not None
            self._is_read_R.index_fill_(0, rows_V, True)
            return whole_RD
        assert self._whole_RD is None
        leaves_places = self._leaves_places
        rows_U, sums_UD = self._in_places() if leaves_places else self.merged()
        # One more row, which takes what is in unused places if rows_V has none.
        spread_VD = sums_UD.new_zeros(len(rows_V) + 1, self.width)
        spread_VD[torch.searchsorted(rows_V, rows_U)] = sums_UD
        self._rows, self._sums, self._has_places = [rows_V], [spread_VD[:-1]], leaves_places
        return spread_VD[:-1]

    def norm(self) -> Tensor:
        """Return the exact global 2-norm (rows not read have no gradient), a 0-dim tensor."""
        self._apply_scale()
        return torch.linalg.vector_norm(self._all_sums())

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply the gradients by a factor, applied lazily: when they are next read."""
        self._apply_scale()
        self._scale = torch.as_tensor(factor, dtype=self.dtype, device=self.device)

    def _apply_scale(self) -> None:
        if self._scale is not None:
            scale, self._scale = self._scale, None
            self._all_sums().mul_(scale)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale to a global norm of at most `max_norm`, as torch's clip_grad_norm_ does; returns the norm before."""
        norm = self.norm()
        factor = max_norm / (norm + 1e-6)
        if not factor >= 1.0:  # also if the norm is NaN, which must not be hidden
            self.scale_(factor)
        return norm

    def clear(self) -> None:
        """Drop all gradients and the cached grouping."""
        self._rows, self._sums, self._lookups, self._has_places = [], [], 0, False
        self._scale = self._whole_RD = self._is_read_R = None
        self._groups.clear()

    def _all_sums(self) -> Tensor:
        if self._whole_RD is not None:
            return self._whole()[0]
        return self._in_places()[1] if self._has_places else self.merged()[1]

    def _in_places(self) -> tuple[Tensor, Tensor]:
        """Return rows and sums, merged without waiting: unused places hold the row R and zeros."""
        if len(self._rows) > 1:
            triton = dispatch.module("embedding_bag", "triton")
            rows_P, sums_PD = triton.merge(torch.cat(self._rows), torch.cat(self._sums), self.table_rows)
            self._rows, self._sums, self._has_places = [rows_P], [sums_PD], True
        return (self._rows[0], self._sums[0]) if self._rows else self._nothing()

    def _nothing(self) -> tuple[Tensor, Tensor]:
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        return empty, torch.zeros(0, self.width, dtype=self.dtype, device=self.device)

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Return the buffer of the whole table and which rows were read; what was compact so far is moved there."""
        if self._whole_RD is None or self._is_read_R is None or self._rows:
            pieces = list(zip(self._rows, self._sums, strict=True))
            self._rows, self._sums, self._has_places = [], [], False
            if self._whole_RD is None or self._is_read_R is None:
                # One more row, which takes what is in unused places.
                self._whole_RD = torch.zeros(self.table_rows + 1, self.width, dtype=self.dtype, device=self.device)
                self._is_read_R = torch.zeros(self.table_rows + 1, dtype=torch.bool, device=self.device)
            for rows_P, sums_PD in pieces:
                self._whole_RD.index_add_(0, rows_P, sums_PD)  # every row once, unused places zero: the order is fixed
                self._is_read_R.index_fill_(0, rows_P, True)
        return self._whole_RD[:-1], self._is_read_R[:-1]


def _leaves_counts(ops: ModuleType) -> bool:
    """Return whether an implementation leaves the number of rows that were read on the device."""
    return hasattr(ops, "Lookups")
