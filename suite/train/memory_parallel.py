"""A value table divided by columns among the processes of a node, and replicated across nodes.

Each process holds columns [m C, (m + 1) C) of every row, C = D / M. To read, the group's processes exchange which
rows their tokens want and with what weights, look up their own columns for the tokens of all, and send each process
the columns of its tokens; the backward pass is the same in reverse. A process therefore owns the whole gradient of
its columns from the tokens of its group, as compact rows; what other groups read is exchanged as compact rows too.

Shapes: M processes of the group, N tokens of a process, G = M*N tokens of the group, S rows read per token, R rows,
D row width, C = D / M own columns, U unique rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from suite.models.memory_table import MemoryTable

INT32_ROWS = 1 << 31


class ColumnTable(MemoryTable):
    """A process's columns of a table; reads as the whole table does, given that all of its group read together."""

    def __init__(self, rows: int, dim: int, mesh: DeviceMesh) -> None:
        """rows and dim are the whole table's; mesh: "replica" x "memory", of which the second divides dim."""
        self.mesh, self.group, self.replicas = mesh, mesh.get_group("memory"), mesh.get_group("replica")
        self.members = self.group.size()
        super().__init__(rows, dim // self.members)

    def columns(self) -> slice:
        """Which of the whole table's columns are here."""
        width = self.weight.shape[1]
        first = self.mesh.get_local_rank("memory") * width
        return slice(first, first + width)

    def whole(self, own_RC: Tensor) -> DTensor:
        """A tensor of rows as this process holds it (the weights, a moment) as its part of the whole one."""
        return DTensor.from_local(own_RC, self.mesh, (Replicate(), Shard(1)), run_check=False)

    def forward(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """As of the whole table, [N, D]."""
        if self.members == 1:
            return super().forward(indices_NS, weights_NS)
        indices_GS, weights_GS = self._of_all(indices_NS), _Gather.apply(weights_NS, self.group)
        return self._to_tokens(super().forward(indices_GS, weights_GS))

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """As of the whole table, [N, S]: each process's part of the products, summed."""
        if self.members == 1:
            return super().products(indices_NS, x_ND)
        partial_GS = super().products(self._of_all(indices_NS), self._to_columns(x_ND))
        products_NS: Tensor = _SumOwn.apply(partial_GS, self.group)
        return products_NS

    def share_gradient(self) -> None:
        """Add up what the replicas' tokens say of these columns, in order of replicas: the same sums for all."""
        if self.replicas.size() == 1:
            return
        if self.gradients is not None:
            pieces = all_rows(*self.gradients.merged(), self.replicas)
            self.gradients.clear()
            for rows_U, sums_UC in pieces:
                self.gradients.add(rows_U, sums_UC)
        elif self.weight.grad is not None:
            dist.all_reduce(self.weight.grad, group=self.replicas)

    def share_reads(self, counts: Tensor) -> None:
        """Add up what the replicas' tokens read; within a group every process sees the reads of all."""
        if self.replicas.size() > 1:
            dist.all_reduce(counts, group=self.replicas)

    def norm_of_columns(self, norm: Tensor) -> Tensor:
        """The norm over the columns of all processes."""
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _of_all(self, indices_NS: Tensor) -> Tensor:
        narrow = indices_NS.to(torch.int32) if len(self.weight) < INT32_ROWS else indices_NS
        return _gather(narrow, self.group).to(torch.int64)

    def _to_tokens(self, x_GC: Tensor) -> Tensor:
        """From own columns of all tokens to all columns of own tokens."""
        swapped_MNC = _Swap.apply(x_GC, self.group).view(self.members, -1, x_GC.shape[1])
        return swapped_MNC.transpose(0, 1).flatten(1)

    def _to_columns(self, x_ND: Tensor) -> Tensor:
        """From all columns of own tokens to own columns of all tokens."""
        columns_MNC = x_ND.unflatten(1, (self.members, -1)).transpose(0, 1)
        swapped_GC: Tensor = _Swap.apply(columns_MNC.flatten(0, 1), self.group)
        return swapped_GC


def all_rows(rows_U: Tensor, sums_UD: Tensor, group: ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """The compact row gradients (int64 rows, sums) of every process of the group, by rank."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows_U.device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(rows_U)], device=rows_U.device), group=group)
    lengths = [int(count) for count in counts]
    longest = max(lengths)
    padded_rows, padded_sums = rows_U.new_zeros(longest), sums_UD.new_zeros(longest, sums_UD.shape[1])
    padded_rows[: len(rows_U)], padded_sums[: len(rows_U)] = rows_U, sums_UD
    every_rows = _gather(padded_rows, group).split(longest) if longest else [padded_rows] * len(lengths)
    every_sums = _gather(padded_sums, group).split(longest) if longest else [padded_sums] * len(lengths)
    return [(rows[:length], sums[:length]) for rows, sums, length in zip(every_rows, every_sums, lengths, strict=True)]


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    every = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(every, x.contiguous(), group=group)
    return every


def _sum_own(x: Tensor, group: ProcessGroup) -> Tensor:
    own = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own


def _swap(x: Tensor, group: ProcessGroup) -> Tensor:
    swapped = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(swapped, x.contiguous(), group=group)
    return swapped


class _Gather(torch.autograd.Function):
    """Every process's tokens, in order of rank; gradients go back to their owner, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_own(grad, ctx.group), None


class _SumOwn(torch.autograd.Function):
    """The sum over processes of what they have of this one's tokens: `_Gather` in reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_own(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


class _Swap(torch.autograd.Function):
    """Block m of this process goes to process m, whose block for this one takes its place; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _swap(grad, ctx.group), None
