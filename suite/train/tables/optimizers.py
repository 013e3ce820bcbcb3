"""Optimizers of value tables that update only the rows a step has read.

Shapes: R table rows, D width, U rows with gradients, P places of rows with gradients; E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.embedding_bag import LatestGroups, RowGradients
from kernels.row_adamw import RowAdamW
from suite.cells import TrainConfig
from suite.errors import UserError
from suite.models.memory_table import MemoryTable
from suite.models.moe import Experts

REPLAY_LIMIT_GPU = 256
"""Skipped steps replayed per row on a GPU. A CPU replays all, so that flushing a table changes no bit."""

LOW_PRECISION: dict[str, Literal["nearest", "stochastic", "master"]] = {
    "fp32": "nearest",
    "bf16": "nearest",
    "bf16_master": "master",
    "bf16_stochastic": "stochastic",
}
"""Rounding mode of RowAdamW by train.value_precision."""


class RowSGD:
    """SGD without momentum: a row that was read becomes (1 - lr * weight_decay) * row - lr * gradient.

    Rows that were not read do not move, so nothing has to be replayed. The only state is a flag per row that was ever
    read.
    """

    def __init__(self, table_RD: Tensor, gradients: RowGradients, weight_decay: float) -> None:
        self.table_RD, self.gradients, self.weight_decay = table_RD.detach(), gradients, weight_decay
        self.touched_R = torch.zeros(len(table_RD), dtype=torch.bool, device=table_RD.device)

    @property
    def never_read(self) -> int:
        """Rows that never had a gradient."""
        return int(self.touched_R.logical_not().sum())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the rows with gradients and clear the gradients."""
        if self.gradients.leaves_counts:
            self._step_on_device(lr)
        else:
            rows_U, gradients_UD = self.gradients.merged()
            self.table_RD[rows_U] = (1 - lr * self.weight_decay) * self.table_RD[rows_U] - lr * gradients_UD
            self.touched_R[rows_U] = True
        self.gradients.clear()

    def _step_on_device(self, lr: float) -> None:
        """Update the rows without their number, which only the device knows."""
        rows_P, sums, is_read_R, scale = self.gradients.placed()
        if scale is not None:
            sums.mul_(scale)
        if rows_P is None:  # sums of the whole table, zero in rows that were not read
            assert is_read_R is not None
            self.table_RD.mul_(1 - lr * self.weight_decay * is_read_R[:, None].to(sums.dtype)).add_(sums, alpha=-lr)
        else:
            # An unused place holds the row R and zeros: adding zeros to the last row changes nothing.
            rows = len(self.table_RD)
            is_read_R = torch.zeros(rows + 1, dtype=torch.bool, device=rows_P.device).index_fill_(0, rows_P, True)[:-1]
            is_used_P1 = (rows_P < rows)[:, None]
            rows_P = rows_P.clamp(max=rows - 1)
            decay_PD = (self.weight_decay * self.table_RD[rows_P]).masked_fill_(~is_used_P1, 0)
            self.table_RD.index_add_(0, rows_P, decay_PD.add_(sums), alpha=-lr)
        self.touched_R |= is_read_R

    def state_dict(self) -> dict[str, Tensor]:
        """Return the flags of the rows that were ever read."""
        return {"touched": self.touched_R}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue from a saved state; the table itself is loaded by its owner."""
        self.touched_R.copy_(saved["touched"])


class ExpertStack:
    """One stacked weight of experts as a table with a row per expert, for the optimizers of tables.

    Its gradient comes from autograd, dense; `share_gradient` moves it to `gradients`.

    Args:
        stack: A parameter [E, ...] of `experts`.
        experts: The experts, which call `before_read`.
    """

    def __init__(self, stack: nn.Parameter, experts: Experts) -> None:
        self.stack, self.before_read = stack, experts.before_read
        self.before_sharing: list[Callable[[Tensor], None]] = []
        self.first_column = 0
        self.weight = stack.detach().flatten(1)
        self.gradients: RowGradients | None = None

    def share_gradient(self) -> None:
        """Move the gradient to `gradients`, if a row optimizer has set it."""
        if self.gradients is not None and self.stack.grad is not None:
            rows_E = torch.arange(len(self.stack), device=self.stack.device)
            self.gradients.add(rows_E, self.stack.grad.flatten(1))
            self.stack.grad = None

    def norm_of_columns(self, norm: Tensor) -> Tensor:
        """Return the norm: whole rows are stored here."""
        return norm

    def bfloat16(self) -> None:
        """Refuse another precision than that of the model."""
        raise UserError("train.value_precision: applies to value tables, allowed for experts: fp32")


Table = MemoryTable | ExpertStack


def row_sgd(table: Table, weight_decay: float, groups: LatestGroups) -> RowSGD:
    """Attach SGD to the table, which from now on collects compact row gradients."""
    table.gradients = RowGradients(table.weight, groups)
    return RowSGD(table.weight, table.gradients, weight_decay)


def row_adamw(table: Table, config: TrainConfig, weight_decay: float, groups: LatestGroups) -> RowAdamW:
    """Attach AdamW to the table, which from now on collects compact row gradients and reports every read.

    Args:
        table: The table, which is converted to bfloat16 unless `value_precision` is fp32.
        config: The training configuration.
        weight_decay: Decoupled weight decay.
        groups: The latest lookups, shared by all tables of the model.

    Returns:
        The optimizer.
    """
    if config.value_precision != "fp32":
        table.bfloat16()
    limit = REPLAY_LIMIT_GPU if table.weight.is_cuda else None
    table.gradients = RowGradients(table.weight, groups)
    adamw = RowAdamW(
        table.weight,
        table.gradients,
        betas=config.betas,
        eps=config.eps,
        weight_decay=weight_decay,
        replay_limit=config.value_replay_limit or limit,
        low_precision=LOW_PRECISION[config.value_precision],
        row_second_moment=config.value_second_moment == "row",
        lazy=config.value_lazy,
        first_column=table.first_column,
    )
    host = table.host if isinstance(table, MemoryTable) else None
    (table.before_read if host is None else host.before_copy).append(adamw.before_read)
    table.before_sharing.append(adamw.before_read)
    return adamw
