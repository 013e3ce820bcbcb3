"""A value table sharded by columns over the processes of a group, and replicated across groups.

Process m of a group holds columns [m C, (m + 1) C) of every row, C = D / M. To read, the processes of a group gather
the indices and weights of all their tokens, look up their own columns for all of them, and send each process the
columns of its tokens. The backward pass does the reverse. Each process thus has the full gradient of its columns from
the tokens of its group, as compact rows. Replicas sum them over the rows that any of them has read.

Shapes: M processes of a group, N tokens of a process, G = M*N tokens of the group, S rows read per token, R rows,
D row width, C = D / M own columns, V rows that any replica has read.
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
    """This process's columns of a table. Reads give rows of the whole table; all processes of a group read together."""

    def __init__(self, table: MemoryTable, mesh: DeviceMesh) -> None:
        """Allocate this process's columns.

        Args:
            table: The whole table [R, D], on the meta device.
            mesh: The mesh "replica" x "memory"; the size of its second dimension divides D.
        """
        self.mesh, self.group, self.replicas = mesh, mesh.get_group("memory"), mesh.get_group("replica")
        self.members = self.group.size()
        rows, dim = table.weight.shape
        super().__init__(rows, dim // self.members)
        self.initial_values = table.initial_values  # type: ignore[method-assign]  # of the whole table
        if hasattr(table, "init_parameter"):
            self.init_parameter = table.init_parameter
        if table.control is not None:
            self.set_control(table.control)

    @property
    def first_column(self) -> int:
        """The place in the whole table of this process's first column."""
        return self.mesh.get_local_rank("memory") * self.weight.shape[1]

    def as_dtensor(self, own_RC: Tensor) -> DTensor:
        """Wrap this process's columns of a tensor of rows (weights, a moment) as a DTensor of the whole tensor."""
        return DTensor.from_local(own_RC, self.mesh, (Replicate(), Shard(1)), run_check=False)

    def forward(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """Return the weighted sums of rows of the whole table, [N, D]."""
        if self.members == 1:
            return super().forward(indices_NS, weights_NS)
        indices_GS, weights_GS = self._gather_indices(indices_NS), _AllGather.apply(weights_NS, self.group)
        return self._to_tokens(super().forward(indices_GS, weights_GS))

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """Return the inner products with rows of the whole table, [N, S], summed over the processes' columns."""
        if self.members == 1:
            return super().products(indices_NS, x_ND)
        partial_GS = super().products(self._gather_indices(indices_NS), self._to_columns(x_ND))
        products_NS: Tensor = _ReduceScatter.apply(partial_GS, self.group)
        return products_NS

    def share_gradient(self) -> None:
        """Sum the gradient over replicas, in the same order everywhere, so that all have equal sums.

        Compact gradients are summed over the rows that any replica has read: as those rows alone, or as the whole table
        if they are most of it. What is sent and allocated thus does not grow with the number of replicas. On a GPU the
        lookups decide, of which the host knows the number, and no replica waits for the rows.
        """
        if self.replicas.size() == 1:
            return
        if self.gradients is None:
            if self.weight.grad is not None:
                dist.all_reduce(self.weight.grad, group=self.replicas)
            return
        is_read_R = self.gradients.is_read().to(torch.uint8)
        dist.all_reduce(is_read_R, dist.ReduceOp.MAX, group=self.replicas)
        rows_V = self.gradients.rows_to_share(is_read_R.bool(), self.replicas.size())
        for listener in self.before_sharing:
            listener(rows_V)
        dist.all_reduce(self.gradients.spread(rows_V), group=self.replicas)

    def share_reads(self, counts: Tensor) -> None:
        """Sum counts of reads over replicas; within a group every process already counts the reads of all."""
        if self.replicas.size() > 1:
            dist.all_reduce(counts, group=self.replicas)

    def norm_of_columns(self, norm: Tensor) -> Tensor:
        """Return the norm over all columns, given that of this process's columns."""
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def _gather_indices(self, indices_NS: Tensor) -> Tensor:
        narrow = indices_NS.to(torch.int32) if len(self.weight) < INT32_ROWS else indices_NS
        return _all_gather(narrow, self.group).to(torch.int64)

    def _to_tokens(self, x_GC: Tensor) -> Tensor:
        """Return the own columns of all tokens -> all columns of own tokens."""
        swapped_MNC = _AllToAll.apply(x_GC, self.group).view(self.members, -1, x_GC.shape[1])
        return swapped_MNC.transpose(0, 1).flatten(1)

    def _to_columns(self, x_ND: Tensor) -> Tensor:
        """Return all columns of own tokens -> own columns of all tokens."""
        columns_MNC = x_ND.unflatten(1, (self.members, -1)).transpose(0, 1)
        swapped_GC: Tensor = _AllToAll.apply(columns_MNC.flatten(0, 1), self.group)
        return swapped_GC


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def _reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    own = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    swapped = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(swapped, x.contiguous(), group=group)
    return swapped


class _AllGather(torch.autograd.Function):
    """Gathers the tokens of all processes by rank; gradients are summed and sent back to their process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Sums the processes' values for this process's tokens: the reverse of `_AllGather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    """Exchanges blocks: block m goes to process m, whose block for this process is received. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None
