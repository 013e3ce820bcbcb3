"""The value rows of a memory, and what a layer that reads them has in common.

Shapes: N tokens, S rows read per token (heads x top_k), R rows, D row width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embedding_bag import RowGradients, embedding_bag, embedding_dot
from suite.models.cost import Cost
from suite.models.precision import at_least_fp32

ROWS_AT_ONCE = 1 << 26
"""Elements of rows that `products` holds at a time."""


class MemoryTable(nn.Module):
    """`rows` trainable rows of width `dim`, read as weighted sums.

    `before_read` holds functions called with the indices of every read, before it: an optimizer that updates
    touched rows only, or a count of key usage, listens there. With `gradients`, backward passes put compact row
    gradients there and leave `weight.grad` None; without, the gradient is dense. Initial values are normal with
    standard deviation dim^-1/2 (released code).
    """

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.before_read: list[Callable[[Tensor], None]] = []
        self.gradients: RowGradients | None = None

    @property
    def wide(self) -> torch.dtype:
        """What is computed in: the rows' dtype, fp32 where they are narrower."""
        return at_least_fp32(self.weight.dtype)

    def forward(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """The sums over S of weights x rows, [N, D], in fp32 (float64 of such a table); indices: int64 in [0, rows)."""
        for listener in self.before_read:
            listener(indices_NS)
        weights_NS = weights_NS.to(self.wide)
        if self.gradients is not None:
            return embedding_bag(self.weight, indices_NS, weights_NS, self.gradients).to(self.wide)
        return F.embedding_bag(indices_NS, self.weight.to(self.wide), per_sample_weights=weights_NS, mode="sum")

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """The inner products of each token's rows with the token, [N, S], in fp32 (float64 of such a table)."""
        for listener in self.before_read:
            listener(indices_NS)
        if self.gradients is not None:
            return embedding_dot(self.weight, indices_NS, x_ND.to(self.wide), self.gradients)
        products_NS: Tensor = _Products.apply(indices_NS, self.weight.to(self.wide), x_ND.to(self.wide))
        return products_NS

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The released code's initial values."""
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def share_gradient(self) -> None:
        """Called when gradients are complete: a table that processes replicate adds up theirs."""

    def share_reads(self, counts: Tensor) -> None:
        """Called when counts of this table's reads are complete: a table that processes replicate adds up theirs."""

    def norm_of_columns(self, norm: Tensor) -> Tensor:
        """The norm of something of whole rows, given that of the columns held here: all of them."""
        return norm

    def cost(self) -> Cost:
        """The rows; reading them is counted by the layers that read."""
        return Cost(params={"memory_values": self.weight.numel()})


class MemoryLayer(nn.Module):
    """A module that reads memory tables; `tables` may be shared with other layers of the same model.

    The tables stay out of the module's own parameters (a plain list is not a submodule): the Transformer owns
    each distinct table once, under a name of its own. The S rows of a read are `heads_per_read` heads' rows side by
    side.
    """

    heads_per_read = 1

    def __init__(self, tables: list[MemoryTable]) -> None:
        super().__init__()
        self.tables = tables


class _Products(torch.autograd.Function):
    """Rows times tokens without keeping the rows: both gradients are those of a weighted sum of rows."""

    @staticmethod
    def forward(ctx: Any, indices_NS: Tensor, weight_RD: Tensor, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(indices_NS, weight_RD, x_ND)
        step = max(1, ROWS_AT_ONCE // (indices_NS.shape[1] * weight_RD.shape[1]))
        parts = zip(indices_NS.split(step), x_ND.unsqueeze(-1).split(step), strict=True)
        return torch.cat([(F.embedding(rows_NS, weight_RD) @ x_ND1).squeeze(-1) for rows_NS, x_ND1 in parts])

    @staticmethod
    def backward(ctx: Any, grad_NS: Tensor) -> tuple[None, Tensor, Tensor]:
        indices_NS, weight_RD, x_ND = ctx.saved_tensors
        with torch.enable_grad():
            leaf_RD = weight_RD.detach().requires_grad_()
            sums_ND = F.embedding_bag(indices_NS, leaf_RD, per_sample_weights=grad_NS, mode="sum")
            (grad_RD,) = torch.autograd.grad(sums_ND, leaf_RD, x_ND)
        return None, grad_RD, sums_ND.detach()
