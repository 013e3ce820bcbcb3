"""The value rows of a memory, and the base class of layers that read them.

Shapes: B rows of T tokens, N tokens in all, S rows read per token (heads x top_k), R rows, D row width, X rows of the
matrix that is read (R, or the distinct rows of the read).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.embedding_bag import RowGradients, embedding_bag, embedding_dot
from suite.models.cost import Cost
from suite.models.distributions import Distribution, Normal
from suite.models.precision import at_least_fp32

ROWS_AT_ONCE = 1 << 26
"""Largest number of row elements that `products` gathers at a time."""


RowForm = Literal["bf16", "int8", "int4", "fp8", "nf4"]
"""Forms of rows that take fewer bytes than fp32 (docs/serving-tables.md)."""


class StoredRows(Protocol):
    """Rows that a table reads from elsewhere than its weight, in inference (suite/inference/tables)."""

    def sums(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """Return the weighted sums of rows, [N, D]; weights have the dtype `wide` of the table."""
        ...

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """Return the inner products of each token with its rows, [N, S]; x has the dtype `wide` of the table."""
        ...


class Readable(NamedTuple):
    """A matrix, the numbers in it of the rows of a read, and where their gradients go (None: autograd)."""

    rows_XD: Tensor
    numbers_NS: Tensor
    gradients: RowGradients | None


class HostRows(Protocol):
    """Copies the rows of each read to the device, in training with the weight in host memory (suite/train/tables)."""

    before_copy: list[Callable[[Tensor], None]]

    def copied(self, indices_NS: Tensor) -> Readable:
        """Return a copy of the distinct rows of a read, on the device of `indices_NS`."""
        ...

    def receive_gradients(self) -> None:
        """Wait until the table has all gradients of the backward passes so far."""
        ...


class MemoryTable(nn.Module):
    """`rows` trainable rows of width `dim`, read as weighted sums.

    `before_read` holds functions that are called with the indices of each read before it happens; the row-wise
    optimizer and the counter of key usage register there. Functions in `before_sharing` are called with the rows whose
    gradients are about to be summed over replicas; this process need not have read them. If `gradients` is set,
    backward passes write compact row gradients to it and leave `weight.grad` None; otherwise the gradient is dense.
    Initial values are normal with standard deviation `std`; None: dim^-1/2 (released code). `set_control` makes it a
    control (lookup/controls.py). While `is_off`, every row reads as zeros. If `host` is set, `weight` is in host
    memory, and reads use copies of its rows. If `stored` is set, rows come from there and `weight` has a shape and a
    dtype but no values.
    """

    order_R: Tensor

    def __init__(self, rows: int, dim: int, std: float | None = None) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.before_read: list[Callable[[Tensor], None]] = []
        self.before_sharing: list[Callable[[Tensor], None]] = []
        self.gradients: RowGradients | None = None
        self.control: str | None = None
        self.is_off = False
        self.host: HostRows | None = None
        self.stored: StoredRows | None = None

    def set_control(self, control: str) -> None:
        """Become a control: "one_row", "frozen", or "shuffled" (addresses lead to rows in a fixed random order)."""
        self.control = control
        if control == "one_row":
            self.weight = nn.Parameter(self.weight[:1].detach().clone())
        elif control == "frozen":
            self.weight.requires_grad_(False)
        else:
            order_R = torch.empty(len(self.weight), dtype=torch.int32, device=self.weight.device)
            self.register_buffer("order_R", order_R)
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Draw the order of shuffled rows, the same for every seed of a run."""
        if self.control == "shuffled" and not self.order_R.is_meta:
            self.order_R.copy_(torch.randperm(len(self.order_R), generator=torch.Generator().manual_seed(0)))

    def rows_of(self, addresses_NS: Tensor) -> Tensor:
        """Return the rows that are read at these addresses, which differ from them only in a control."""
        if self.control == "one_row":
            return torch.zeros_like(addresses_NS)
        return self.order_R[addresses_NS].long() if self.control == "shuffled" else addresses_NS

    @property
    def first_column(self) -> int:
        """The place in the whole table of the first column stored here."""
        return 0

    @property
    def wide(self) -> torch.dtype:
        """The dtype of computations: that of the rows, but at least fp32."""
        return at_least_fp32(self.weight.dtype)

    def forward(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """Return the weighted sums of rows, [N, D], in dtype `wide`; indices are int64 in [0, rows)."""
        if self.is_off:
            return weights_NS.new_zeros(len(weights_NS), self.weight.shape[1], dtype=self.wide)
        indices_NS = self.rows_of(indices_NS)
        for listener in self.before_read:
            listener(indices_NS)
        weights_NS = weights_NS.to(self.wide)
        if self.stored is not None:
            return self.stored.sums(indices_NS, weights_NS)
        rows_XD, numbers_NS, gradients = self._readable(indices_NS)
        if gradients is not None:
            return embedding_bag(rows_XD, numbers_NS, weights_NS, gradients).to(self.wide)
        return F.embedding_bag(numbers_NS, rows_XD.to(self.wide), per_sample_weights=weights_NS, mode="sum")

    def concatenated(self, indices_BTS: Tensor) -> Tensor:
        """Return the rows of each token side by side, [B, T, S * D], in dtype `wide`: a bag of one row is a row."""
        indices_N1 = indices_BTS.reshape(-1, 1)
        rows_ND = self(indices_N1, torch.ones_like(indices_N1, dtype=self.wide))
        return rows_ND.view(*indices_BTS.shape[:2], -1)

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """Return the inner products of each token with its rows, [N, S], in dtype `wide`."""
        if self.is_off:
            return x_ND.new_zeros(indices_NS.shape, dtype=self.wide)
        indices_NS = self.rows_of(indices_NS)
        for listener in self.before_read:
            listener(indices_NS)
        x_ND = x_ND.to(self.wide)
        if self.stored is not None:
            return self.stored.products(indices_NS, x_ND)
        rows_XD, numbers_NS, gradients = self._readable(indices_NS)
        if gradients is not None:
            return embedding_dot(rows_XD, numbers_NS, x_ND, gradients)
        return row_products(numbers_NS, rows_XD.to(self.wide), x_ND)

    def _readable(self, indices_NS: Tensor) -> Readable:
        """Return the matrix that a read uses: all rows, or a copy of those that it needs."""
        if self.host is not None:
            return self.host.copied(indices_NS)
        return Readable(self.weight, indices_NS, self.gradients)

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return the distribution of the rows' initial values; see `initial_weights.initialise`."""
        return Normal(shape[1] ** -0.5 if self.std is None else self.std)

    def share_gradient(self) -> None:
        """Complete the gradients: sum those of replicas, or wait for those that the device sends to host memory."""
        if self.host is not None:
            self.host.receive_gradients()

    def share_reads(self, counts: Tensor) -> None:
        """Sum counts of reads over replicas once they are complete; nothing to do in a single process."""

    def norm_of_columns(self, norm: Tensor) -> Tensor:
        """Return the norm over whole rows, given the norm over the columns stored here (all, in a single process)."""
        return norm

    def cost(self) -> Cost:
        """Count the rows; layers count what they read."""
        return Cost(params={"memory_values": self.weight.numel()})


class MemoryLayer(nn.Module):
    """A module that reads memory tables; `tables` may be shared with other layers of the same model.

    Tables are in a plain list, not submodules, so they are not parameters of the layer: the Transformer owns each
    distinct table once. The S rows of a read are those of `heads_per_read` heads, one head after the other.
    """

    heads_per_read = 1

    def __init__(self, tables: list[MemoryTable]) -> None:
        super().__init__()
        self.tables = tables

    def addresses(self, ids_BTW: Tensor) -> Tensor | None:
        """Return the indices [N, S] that a pass reads of every table, if they follow from token ids alone.

        A table outside of the device can then be read before the layer runs. The default is None: the indices follow
        from the hidden state. `ids_BTW` are those that the module requests with its `window`.
        """
        return None


def copied_rows(rows_RD: Tensor, rows_U: Tensor, device: torch.device) -> Tensor:
    """Return a copy of some rows in host memory on a device; to a GPU they travel from pinned memory.

    Args:
        rows_RD: All rows, in host memory.
        rows_U: Numbers of rows, int64, in host memory.
        device: The device.
    """
    gathered = rows_RD.index_select(0, rows_U)
    return gathered.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else gathered


def row_products(indices_NS: Tensor, rows_RD: Tensor, x_ND: Tensor) -> Tensor:
    """Return the inner products of each token with its rows, [N, S]; rows and tokens have the same dtype."""
    products_NS: Tensor = _Products.apply(indices_NS, rows_RD, x_ND)
    return products_NS


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products have the dtype of their arguments; the meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class _Products(torch.autograd.Function):
    """Inner products of rows and tokens that do not save the rows; the backward pass uses weighted sums of rows."""

    @staticmethod
    def forward(ctx: Any, indices_NS: Tensor, weight_RD: Tensor, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(indices_NS, weight_RD, x_ND)
        step = max(1, ROWS_AT_ONCE // (indices_NS.shape[1] * weight_RD.shape[1]))
        parts = zip(indices_NS.split(step), x_ND.unsqueeze(-1).split(step), strict=True)
        with _without_autocast(x_ND.device):
            return torch.cat([(F.embedding(rows_NS, weight_RD) @ x_ND1).squeeze(-1) for rows_NS, x_ND1 in parts])

    @staticmethod
    def backward(ctx: Any, grad_NS: Tensor) -> tuple[None, Tensor | None, Tensor]:
        indices_NS, weight_RD, x_ND = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, F.embedding_bag(indices_NS, weight_RD, per_sample_weights=grad_NS, mode="sum")
        with torch.enable_grad():
            leaf_RD = weight_RD.detach().requires_grad_()
            sums_ND = F.embedding_bag(indices_NS, leaf_RD, per_sample_weights=grad_NS, mode="sum")
            (grad_RD,) = torch.autograd.grad(sums_ND, leaf_RD, x_ND)
        return None, grad_RD, sums_ND.detach()
