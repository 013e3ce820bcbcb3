"""Weighted sums of table rows; the cost of the backward pass depends on the rows read and not on the table's size.

    sink = RowGradients(table)                              # one per table, shared by all layers reading it
    out_ND = embedding_bag(table_RD, indices_NS, weights_NS, sink)
    out_ND.sum().backward()                                 # gradients of weights by autograd ...
    rows_U, sums_UD = sink.merged()                         # ... and compact gradients of the rows read

`embedding_dot` is the transpose: dot products of rows with a vector per bag (the first half of a PEER expert).
Both take tables of any float dtype (float64, float32, bfloat16, float16), sum in float32 (float64 for float64 tables),
take int64 indices, and accept N = 0 and S = 0. The backward pass is deterministic: a stable sort by row, then sums in a
fixed order, without atomics.

Shapes: R table rows, D width, N bags, S rows read per bag, U unique rows.
Source: `y = sum of softmax(score) * V` over the selected rows, "Memory Layers at Scale" (arXiv 2412.09764), eq. 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch
from kernels.embedding_bag.gradients import LatestGroups, RowGradients
from kernels.embedding_bag.reference import Groups, group_by_row

__all__ = ["Groups", "LatestGroups", "RowGradients", "embedding_bag", "embedding_dot", "group_by_row"]


def embedding_bag(
    table_RD: Tensor, indices_NS: Tensor, weights_NS: Tensor, sink: RowGradients, backend: str | None = None
) -> Tensor:
    """Return out_ND[n] = sum over s of weights[n, s] * table[indices[n, s]], in the table's dtype.

    Autograd computes the gradient of the weights, in their dtype. The gradients of the rows go to `sink`, and
    table_RD.grad stays None. A bag may hold a row more than once.

    Args:
        table_RD: The table, any float dtype.
        indices_NS: Rows of the table, int64 in [0, R).
        weights_NS: Weights, any float dtype.
        sink: Collects the gradients of the rows.
        backend: Overrides kernels.dispatch.
    """
    ops = dispatch.implementation("embedding_bag", table_RD, backend, table_RD.is_contiguous())
    groups = _groups(table_RD, indices_NS, sink, ops)
    return _Bag.apply(table_RD, indices_NS, weights_NS, sink, groups, ops)


def embedding_dot(
    table_RD: Tensor, indices_NS: Tensor, x_ND: Tensor, sink: RowGradients, backend: str | None = None
) -> Tensor:
    """Return dots_NS[n, s] = <table[indices[n, s]], x[n]>, in float32 (float64 for a float64 table).

    Autograd computes the gradient of x, in its dtype. The gradients of the rows go to `sink`.

    Args:
        table_RD: The table, any float dtype.
        indices_NS: Rows of the table, int64 in [0, R).
        x_ND: One vector per bag, any float dtype.
        sink: Collects the gradients of the rows.
        backend: Overrides kernels.dispatch.
    """
    ops = dispatch.implementation("embedding_bag", table_RD, backend, table_RD.is_contiguous())
    groups = _groups(table_RD, indices_NS, sink, ops)
    return _Dot.apply(table_RD, indices_NS, x_ND, sink, groups, ops)


def _groups(table_RD: Tensor, indices_NS: Tensor, sink: RowGradients, ops: ModuleType) -> Any:
    """Return what the backward pass needs; None if there will be no backward pass."""
    return sink.groups(indices_NS, ops) if torch.is_grad_enabled() and table_RD.requires_grad else None


# The table is an attribute of ctx instead of a saved tensor: a later layer's replay may update other rows in place
# before this layer's backward pass, and autograd's version check would reject that as a change of the rows read here.


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table_RD: Tensor,
        indices_NS: Tensor,
        weights_NS: Tensor,
        sink: RowGradients,
        groups: Any,
        ops: ModuleType,
    ) -> Tensor:
        ctx.table, ctx.sink, ctx.groups, ctx.ops = table_RD.detach(), sink, groups, ops
        ctx.save_for_backward(indices_NS, weights_NS)
        return ops.bag(ctx.table, indices_NS, weights_NS, table_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        indices_NS, weights_NS = ctx.saved_tensors
        grad_NS = None
        if ctx.needs_input_grad[2]:
            grad_NS = ctx.ops.dots(ctx.table, indices_NS, grad_ND).to(weights_NS.dtype)
        if ctx.groups is not None:
            ctx.sink.add_row_sums(grad_ND, weights_NS, ctx.groups, ctx.ops)
        return None, None, grad_NS, None, None, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table_RD: Tensor,
        indices_NS: Tensor,
        x_ND: Tensor,
        sink: RowGradients,
        groups: Any,
        ops: ModuleType,
    ) -> Tensor:
        ctx.table, ctx.sink, ctx.groups, ctx.ops = table_RD.detach(), sink, groups, ops
        ctx.save_for_backward(indices_NS, x_ND)
        return ops.dots(ctx.table, indices_NS, x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NS: Tensor) -> tuple[Tensor | None, ...]:
        indices_NS, x_ND = ctx.saved_tensors
        grad_ND = None
        if ctx.needs_input_grad[2]:
            grad_ND = ctx.ops.bag(ctx.table, indices_NS, grad_NS, x_ND.dtype)
        if ctx.groups is not None:
            ctx.sink.add_row_sums(x_ND, grad_NS, ctx.groups, ctx.ops)
        return None, None, grad_ND, None, None, None
