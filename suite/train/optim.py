"""AdamW over two groups, value tables and the rest, each with its own rate, weight decay and clipping norm.

Weight decay falls on every tensor, as in the released code (paper: not stated). The two groups are clipped apart,
likewise. Tables are updated by the rows that were read (kernels.row_adamw), which leaves them as dense AdamW would;
`table_optimizer: dense` gives them table-sized gradients and the optimizer of the rest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.embedding_bag import RowGradients
from kernels.row_adamw import RowAdamW
from suite.cells import TrainConfig
from suite.models.memory_table import MemoryTable
from suite.models.transformer import Transformer
from suite.plan.step_memory import STATE_BYTES, TableState

VALUE_LR_RATIO = 10.0
"""Value rate over base rate where a cell sets none: 1e-3 against 1e-4 in the released template."""

REPLAY_LIMIT_GPU = 256
"""Missed steps that a row replays on a GPU; on a CPU all of them, so that when a table is flushed changes no bit."""


LOW_PRECISION: dict[str, Literal["nearest", "stochastic", "master"]] = {
    "fp32": "nearest",
    "bf16": "nearest",
    "bf16_master": "master",
    "bf16_stochastic": "stochastic",
}
"""How RowAdamW rounds, by train.value_precision."""


class Optimizer:
    """AdamW on `values` (the rows of memory tables) and `rest`; one `step` clips, updates and clears gradients."""

    def __init__(self, model: Transformer, config: TrainConfig) -> None:
        self.clip = float("inf") if config.clip is None else config.clip
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.tables = [table for table in model.memory_tables() if table.weight.requires_grad]
        decay = config.weight_decay if config.value_weight_decay is None else config.value_weight_decay
        self.rows = [row_wise(table, config, decay) for table in self.tables if config.table_optimizer == "row_wise"]
        of_tables = {id(table.weight) for table in self.tables}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in of_tables]
        self.dense: dict[str, list[nn.Parameter]] = {"rest": [p for p in rest if p.requires_grad]}
        if self.tables and not self.rows:
            self.dense["values"] = [table.weight for table in self.tables]
        self.base_lr = {"rest": config.lr}
        if self.tables:
            self.base_lr["values"] = config.value_lr or VALUE_LR_RATIO * config.lr
        self.lr = dict(self.base_lr)
        groups = [
            {"params": parameters, "weight_decay": decay if name == "values" else config.weight_decay, "name": name}
            for name, parameters in self.dense.items()
        ]
        self.adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)

    def set_lr(self, factor: float) -> dict[str, float]:
        """Scale both base rates by the schedule's factor; gives the rates in force by group."""
        self.lr = {name: base * factor for name, base in self.base_lr.items()}
        for group in self.adamw.param_groups:
            group["lr"] = self.lr[group["name"]]
        return self.lr

    def step(self) -> dict[str, float]:
        """Clip each group to the cell's norm, update, clear gradients; gives the norms before clipping."""
        for table in self.tables:
            table.share_gradient()
        norms = {name: self._clip(parameters, name) for name, parameters in self.dense.items()}
        if self.rows:
            norms["values"] = self._clip_rows()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for adamw in self.rows:
            adamw.step(self.lr["values"])
        return norms

    def _clip(self, parameters: list[nn.Parameter], group: str) -> float:
        """Clip to a norm, which is that of all processes' parts where the parameters are divided."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if group == "values":
            norm = self.tables[0].norm_of_columns(norm)
        elif hasattr(norm, "full_tensor"):  # a DTensor: a sum over processes that is still to be taken
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm.item()

    def _clip_rows(self) -> float:
        """As `_clip`, over compact gradients: rows that were not read have none."""
        norm = torch.linalg.vector_norm(torch.stack([adamw.gradients.norm() for adamw in self.rows]))
        norm = self.tables[0].norm_of_columns(norm)
        factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
        for adamw in self.rows:
            adamw.gradients.scale_(factor)
        return norm.item()

    def never_read(self, table: MemoryTable) -> int | None:
        """Rows of the table that no step has read yet; None where its gradients are dense, which do not say."""
        for known, adamw in zip(self.tables, self.rows, strict=bool(self.rows)):
            if known is table:
                return adamw.never_read
        return None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments and step counts by parameter name: the tensors in use, made first where no step was taken yet.

        Tables are flushed: their rows are all at the last step.
        """
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                if parameter not in self.adamw.state:
                    self.adamw.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        state = {self.names[id(parameter)]: state for parameter, state in self.adamw.state.items()}
        for table, adamw in zip(self.tables, self.rows, strict=bool(self.rows)):
            saved = adamw.state_dict()
            state[self.names[id(table.weight)]] = {**saved, "step": torch.tensor(saved["step"])}
        return state

    def restored(self, state: dict[str, dict[str, Tensor]]) -> None:
        """To be called once the tensors of `state` have been filled from a checkpoint."""
        for table, adamw in zip(self.tables, self.rows, strict=bool(self.rows)):
            saved = state[self.names[id(table.weight)]]
            adamw.load_state_dict({**saved, "step": int(saved["step"])})


def table_state(config: TrainConfig) -> TableState:
    """What is kept of value tables, in bytes (docs/training.md)."""
    if config.table_optimizer == "dense":
        return TableState(row_wise=False, row=0)
    value = STATE_BYTES if config.value_precision == "fp32" else 2
    copy = STATE_BYTES if config.value_precision == "bf16_master" else 0
    by_row = config.value_second_moment == "row"
    return TableState(
        value=value,
        moments=(1 if by_row else 2) * STATE_BYTES + copy,
        row=TableState.row + (STATE_BYTES if by_row else 0),
    )


def row_wise(table: MemoryTable, config: TrainConfig, weight_decay: float) -> RowAdamW:
    """An optimizer of the table's rows, which from now on gathers compact gradients and is told of every read.

    The table is made bfloat16 where the cell says so.
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
    )
    table.before_read.append(adamw.before_read)
    return adamw
