"""Optimizers of a model: an ordered list of rules decides, by name, how each parameter is trained.

The rules of a cell (`parameter_rules`) give AdamW to every parameter, with a learning rate, weight decay and clipping
norm of its own for value tables, as in the released code of "Memory Layers at Scale", which applies weight decay to
every tensor. Options replace the optimizer of value tables or of hidden matrices. To add an optimizer, add a rule to
`parameter_rules`, and its step and state to `Optimizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.embedding_bag import LatestGroups
from kernels.row_adamw import RowAdamW
from suite.cells import TrainConfig
from suite.models.memory_table import MemoryTable
from suite.models.transformer import Transformer
from suite.train.finetuning.rows import RowChoice, expert_stacks
from suite.train.muon import NamedMuon
from suite.train.tables.optimizers import ExpertStack, RowSGD, Table, row_adamw, row_sgd

OptimizerName = Literal["adamw", "muon", "row_adamw", "row_sgd"]

TABLE_OPTIMIZERS: dict[str, OptimizerName] = {"row_wise": "row_adamw", "dense": "adamw", "sgd": "row_sgd"}
"""Optimizer of value tables by train.table_optimizer."""


@dataclass(frozen=True)
class Rule:
    """How the parameters whose whole name matches a regular expression are trained.

    The parameters of a `group` are clipped by their joint norm. Value tables need a group of their own. The learning
    rate is multiplied by a factor that moves linearly from 1 to `lr_end` in the course of the run.
    """

    pattern: str
    optimizer: OptimizerName
    lr: float
    weight_decay: float
    group: str
    lr_end: float = 1.0


def parameter_rules(model: Transformer, config: TrainConfig) -> list[Rule]:
    """Return the rules of a cell, in order of precedence."""
    table_names = [*tables_of(model, config)]
    value_lr = config.value_lr or model.config.value_lr_ratio * config.lr
    decays = (config.value_weight_decay, model.config.default_value_weight_decay, config.weight_decay)
    value_decay = next(decay for decay in decays if decay is not None)
    value_lr_end = model.config.value_lr_end if config.value_lr_end is None else config.value_lr_end
    rules = []
    if table_names:
        optimizer = TABLE_OPTIMIZERS[config.table_optimizer]
        rules.append(Rule(any_of(table_names), optimizer, value_lr, value_decay, "values", value_lr_end))
    if config.matrix_optimizer == "muon":
        rules.append(Rule(any_of(model.hidden_matrices()), "muon", config.lr, config.weight_decay, "rest"))
    return [*rules, Rule(".*", "adamw", config.lr, config.weight_decay, "rest")]


def tables_of(model: Transformer, config: TrainConfig) -> dict[str, Table]:
    """Return what is trained row by row, by the name of its parameter.

    These are the value tables and, where a cell trains only tables or rows, the experts that tokens choose.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables: dict[str, Table] = {names[id(table.weight)]: table for table in model.memory_tables()}
    if config.trainable.kind in ("tables", "rows"):
        for path, experts in expert_stacks(model).items():
            tables |= {f"{path}.{name}": ExpertStack(stack, experts) for name, stack in experts.named_parameters()}
    return tables


def any_of(names: Iterable[str]) -> str:
    """Return the pattern that matches exactly these names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def match_rules(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """Return the rule of every parameter: the first whose pattern matches its whole name.

    Raises:
        ValueError: A parameter that no rule matches.
    """
    matched = {}
    for name in names:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            raise ValueError(f"no optimizer rule matches the parameter {name}")
        matched[name] = rule
    return matched


class Optimizer:
    """All optimizers of a model; one `step` clips, updates and clears gradients.

    Args:
        model: The model, whose frozen parameters are left out.
        config: The training configuration.
        choice: Which rows of each table a step trains; None: all that it reads.
    """

    def __init__(self, model: Transformer, config: TrainConfig, choice: RowChoice | None = None) -> None:
        self.choice = choice
        self.clip = float("inf") if config.clip is None else config.clip
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tables = {name: table for name, table in tables_of(model, config).items() if name in self.parameters}
        rules = parameter_rules(model, config)
        self.rules = match_rules(self.parameters, rules)
        self.groups: dict[str, list[str]] = {"rest": []}
        for name, rule in self.rules.items():
            self.groups.setdefault(rule.group, []).append(name)
        self.lr = {rule: rule.lr for rule in rules}
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(self._members(rule).values()), "weight_decay": rule.weight_decay, "rule": rule}
                for rule in rules
                if rule.optimizer == "adamw"
            ],
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.muons = {
            rule: NamedMuon(self._members(rule), rule.weight_decay) for rule in rules if rule.optimizer == "muon"
        }
        self.rows: dict[str, RowAdamW | RowSGD] = {}
        groups = LatestGroups()
        for name, table in self.tables.items():
            rule = self.rules[name]
            if rule.optimizer == "row_adamw":
                self.rows[name] = row_adamw(table, config, rule.weight_decay, groups)
            elif rule.optimizer == "row_sgd":
                self.rows[name] = row_sgd(table, rule.weight_decay, groups)
        for group, names in self.groups.items():
            for kind in (self.tables, self.rows):
                if 0 < len(kind.keys() & names) < len(names):
                    raise ValueError(f"clipping group {group} holds parameters with different kinds of gradients")

    def _members(self, rule: Rule) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if self.rules[name] == rule}

    def set_lr(self, factor: float, progress: float = 0.0) -> dict[str, float]:
        """Scale all base rates by the schedule's factor and return the current rates by group.

        `progress` is the share of the run's steps that have been taken.
        """
        self.lr = {rule: rule.lr * factor * (1 + (rule.lr_end - 1) * progress) for rule in self.lr}
        for group in self.adamw.param_groups:
            group["lr"] = self.lr[group["rule"]]
        return {rule.group: lr for rule, lr in self.lr.items()}

    def step(self) -> dict[str, float | Tensor]:
        """Clip each group to the cell's norm, update, clear gradients, and return the norms before clipping.

        Norms on a GPU are tensors there, since reading one would stop the host."""
        for table in self.tables.values():
            table.share_gradient()
        if self.choice is not None:
            for name, rows in self.rows.items():
                self.choice.keep(name, rows.gradients)
        norms = {group: self._clip(names) for group, names in self.groups.items()}
        self.adamw.step()
        for rule, muon in self.muons.items():
            muon.step(self.lr[rule])
        for parameter in self.parameters.values():
            parameter.grad = None
        for name, rows in self.rows.items():
            rows.step(self.lr[self.rules[name]])
        return norms

    def _clip(self, names: list[str]) -> float | Tensor:
        """Clip a group and return its norm, which is that of all processes' shards."""
        tables = [self.tables[name] for name in names if name in self.tables]
        rows = [self.rows[name].gradients for name in names if name in self.rows]
        if rows:
            norm = torch.linalg.vector_norm(torch.stack([gradients.norm() for gradients in rows]))
            norm = tables[0].norm_of_columns(norm)
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            for gradients in rows:
                gradients.scale_(factor)
            return norm if norm.is_cuda else norm.item()
        parameters = [self.parameters[name] for name in names]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if tables:
            norm = tables[0].norm_of_columns(norm)
        elif hasattr(norm, "full_tensor"):  # a DTensor, not yet summed over processes
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm if norm.is_cuda else norm.item()

    def never_read(self, table: MemoryTable) -> int | None:
        """Return rows of the table that no step has read yet; None with dense gradients, which do not record reads."""
        for name, rows in self.rows.items():
            if self.tables[name] is table:
                return rows.never_read
        return None

    def rows_touched(self) -> dict[str, dict[str, int]]:
        """Return the rows that each row-wise optimizer has ever updated, and all its rows, by parameter name."""
        return {
            name: {"touched": len(self.tables[name].weight) - rows.never_read, "rows": len(self.tables[name].weight)}
            for name, rows in self.rows.items()
        }

    def flush(self) -> None:
        """Bring all rows of all tables to the last step; on a CPU, this changes no later value."""
        for rows in self.rows.values():
            if isinstance(rows, RowAdamW):
                rows.flush()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state by parameter name: the tensors in use, created if no step has been taken yet.

        Tables are flushed: all their rows are at the last step.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        state: dict[str, dict[str, Tensor]] = {}
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                if parameter not in self.adamw.state:
                    self.adamw.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                state[names[id(parameter)]] = self.adamw.state[parameter]
        for muon in self.muons.values():
            state |= {name: {"momentum_buffer": buffer} for name, buffer in muon.momentum.items()}
        for name, rows in self.rows.items():
            state[name] = {key: torch.as_tensor(value) for key, value in rows.state_dict().items()}
        return state

    def restored(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Resume from `state`, whose tensors have been filled from a checkpoint."""
        for name, rows in self.rows.items():
            rows.load_state_dict(state[name])
