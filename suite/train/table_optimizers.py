"""Optimizers of value tables that update only the rows a step has read.

Shapes: R table rows, D width, U rows with gradients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.embedding_bag import RowGradients
from kernels.row_adamw import RowAdamW
from suite.cells import TrainConfig
from suite.models.memory_table import MemoryTable

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
        rows_U, gradients_UD = self.gradients.merged()
        self.table_RD[rows_U] = (1 - lr * self.weight_decay) * self.table_RD[rows_U] - lr * gradients_UD
        self.touched_R[rows_U] = True
        self.gradients.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the flags of the rows that were ever read."""
        return {"touched": self.touched_R}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue from a saved state; the table itself is loaded by its owner."""
        self.touched_R.copy_(saved["touched"])


def row_sgd(table: MemoryTable, weight_decay: float) -> RowSGD:
    """Attach SGD to the table, which from now on collects compact row gradients."""
    table.gradients = RowGradients(table.weight)
    return RowSGD(table.weight, table.gradients, weight_decay)


def row_adamw(table: MemoryTable, config: TrainConfig, weight_decay: float) -> RowAdamW:
    """Attach AdamW to the table, which from now on collects compact row gradients and reports every read.

    Args:
        table: The table, which is converted to bfloat16 unless `value_precision` is fp32.
        config: The training configuration.
        weight_decay: Decoupled weight decay.

    Returns:
        The optimizer.
    """
    if config.value_precision != "fp32":
        table.bfloat16()
    limit = REPLAY_LIMIT_GPU if table.weight.is_cuda else None
    table.gradients = RowGradients(table.weight)
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
    table.before_read.append(adamw.before_read)
    table.before_sharing.append(adamw.before_read)
    return adamw
