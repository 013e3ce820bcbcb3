"""A cell: one point of a grid, frozen, fully explicit and content-hashed.

The hash of a cell is the identity of its run: it covers what made the weights (model, data, training, seed,
threads, the source of an external baseline) and leaves out fields at their default, so that adding a field to
the schema changes no old hash. Evaluations carry a hash of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator
from pydantic.functional_validators import BeforeValidator

from suite.data.sources.registry import AnyData
from suite.identity import NOT_IDENTITY, Frozen, identity
from suite.models import registry
from suite.models.registry import ModelConfig

ROW_WISE_OPTIONS = ("value_precision", "value_second_moment", "value_replay_limit", "value_lazy")
"""Fields of TrainConfig that configure `table_optimizer: row_wise` (docs/training.md)."""


LoggerName = Literal["tensorboard", "wandb"]


class TrainConfig(Frozen):
    """How long, how fast and how precisely. Exactly one of `tokens` and `epochs` is the budget."""

    batch_rows: int = Field(gt=0, description="rows of seq_len tokens per optimizer step")
    tokens: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0, description="for bios: exposures of every fact")
    lr: float = Field(gt=0)
    value_lr: float | None = Field(
        default=None, gt=0, description="of value tables; None: ten times lr (released template)"
    )
    matrix_optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="optimizer of the weight matrices inside blocks",
    )
    table_optimizer: Literal["row_wise", "dense", "sgd"] = Field(
        default="row_wise",
        json_schema_extra={"identity_name": "optimizer"},
        description="optimizer of value tables: AdamW or SGD on the rows read; dense: AdamW on all rows",
    )
    value_precision: Literal["fp32", "bf16", "bf16_master", "bf16_stochastic"] = Field(
        default="fp32", description="of value tables; bf16: rounded to nearest, with an fp32 copy, or stochastically"
    )
    value_second_moment: Literal["element", "row"] = Field(
        default="element", description="of value tables: one for each element, or one a row, of its mean square"
    )
    value_replay_limit: int | None = Field(
        default=None, gt=0, description="most missed steps a row makes up for; None: all on a CPU, 256 on a GPU"
    )
    value_lazy: bool = Field(default=False, description="rows that are not read stand still (LazyAdam), not as AdamW")
    weight_decay: float = Field(default=0.1, ge=0)
    value_weight_decay: float | None = Field(default=None, ge=0, description="None: as weight_decay")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup: int = Field(default=0, ge=0, description="steps")
    final_lr: float = Field(default=0.01, ge=0, le=1, description="share of lr at the end of linear, cosine and wsd")
    decay: float = Field(default=0.2, gt=0, le=1, description="wsd: share of the steps, at the end, in which lr falls")
    decay_shape: Literal["1-sqrt", "linear"] = Field(default="1-sqrt", description="wsd: how lr falls")
    branches: tuple[int, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NOT_IDENTITY,
        description="wsd: the token budgets, this one among them, of the cells that share one stable phase",
    )
    clip: float | None = Field(default=1.0, gt=0, description="largest norm, of the values and of the rest apart")
    accumulate: int = Field(default=1, gt=0, description="micro-batches per step; divides batch_rows")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    probes: int = Field(default=0, ge=0, description="log-spaced scorings of bits learned during training")
    stop_past: float | None = Field(default=None, gt=0, lt=1, description="stop two probes past this share of N H")
    log_every: int = Field(default=10, gt=0, json_schema_extra=NOT_IDENTITY)
    checkpoint_every: int = Field(default=200, gt=0, json_schema_extra=NOT_IDENTITY)
    loggers: tuple[LoggerName, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NOT_IDENTITY,
        description="also log to: tensorboard, wandb (each an extra of the package); train.jsonl is always written",
    )
    keep_checkpoints: int = Field(default=2, gt=0, json_schema_extra=NOT_IDENTITY)
    evaluate_every: int | None = Field(
        default=None,
        gt=0,
        json_schema_extra=NOT_IDENTITY,
        description="steps between checkpoints that are asked the cell's evaluations too, beside training",
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "optimizer" in fields:
            raise ValueError("train.optimizer: renamed to table_optimizer")
        return fields

    def problems(self) -> list[tuple[str, object, str]]:
        found: list[tuple[str, object, str]] = []
        if (self.tokens is None) == (self.epochs is None):
            found.append(("tokens", self.tokens, "exactly one of tokens and epochs"))
        if self.batch_rows % self.accumulate:
            found.append(("accumulate", self.accumulate, f"a divisor of batch_rows ({self.batch_rows})"))
        if self.table_optimizer != "row_wise":
            for name in ROW_WISE_OPTIONS:
                default = type(self).model_fields[name].default
                if getattr(self, name) != default:
                    found.append((name, getattr(self, name), f"{default} with table_optimizer {self.table_optimizer}"))
        if self.table_optimizer == "sgd" and self.value_lr is None:
            found.append(("value_lr", None, "a learning rate for table_optimizer sgd, which has no default"))
        limit = self.value_replay_limit
        if self.value_lazy and limit is not None:
            found.append(("value_replay_limit", limit, "nothing with value_lazy: it replays nothing"))
        if self.branches and (self.schedule != "wsd" or self.tokens not in self.branches):
            found.append(("branches", self.branches, "token budgets of wsd cells, train.tokens among them"))
        if self.branches and self.stop_past is not None:
            found.append(("stop_past", self.stop_past, "nothing beside branches: they end at their budgets"))
        if self.evaluate_every is not None and self.evaluate_every % self.checkpoint_every:
            allowed = f"a multiple of checkpoint_every ({self.checkpoint_every})"
            found.append(("evaluate_every", self.evaluate_every, allowed))
        return found


class EvalConfig(Frozen):
    """Tasks asked of a finished run, scored through lm-eval; hashed by itself."""

    tasks: tuple[str, ...] = Field(strict=False, min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0, description="None: as each task says")
    limit: int | None = Field(default=None, gt=0, description="first documents of each task only")

    @property
    def hash8(self) -> str:
        """Eight hex digits of this evaluation's identity."""
        return _digest(identity(self))


def _model_config(value: Any) -> ModelConfig:
    """The `model` block as its family's own options class."""
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a mapping with at least family and base")
    return registry.family(value.get("family")).config.model_validate(value)


class Cell(Frozen):
    """One model x data x training x seed, with the evaluations asked of it."""

    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_model_config)]
    data: AnyData
    train: TrainConfig
    seed: int = Field(default=0, ge=0, description="initial weights and data order")
    threads: int = Field(default=1, gt=0, description="CPU threads: sums differ between thread counts")
    baseline: str | None = Field(default=None, description="sha256 of an external baseline's source")
    evaluate: tuple[EvalConfig, ...] = Field(default=(), strict=False, json_schema_extra=NOT_IDENTITY)

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        for name, part in (
            ("model", self.model),
            ("data", self.data),
            ("train", self.train),
            ("data.tokenizer", self.data.tokenizer),
        ):
            for field, given, allowed in part.problems():
                raise ValueError(f"{name}.{field}: got {given!r}, allowed: {allowed}")
        return self

    def also_asked(self, configs: tuple[EvalConfig, ...]) -> Cell:
        """The cell with further evaluations behind those it was asked before, less the tasks that are among them."""
        asked = self.evaluate
        for config in configs:
            terms = config.num_fewshot, config.limit
            known = {task for one in asked for task in one.tasks if (one.num_fewshot, one.limit) == terms}
            if new := tuple(task for task in dict.fromkeys(config.tasks) if task not in known):
                asked += (config.model_copy(update={"tasks": new}),)
        return self.model_copy(update={"evaluate": asked})

    @property
    def hash8(self) -> str:
        """Eight hex digits of the run's identity."""
        return _digest(identity(self))

    @property
    def slug(self) -> str:
        """A readable name: family, base, half keys where there are any, seed."""
        half_keys = getattr(self.model, "half_keys", None)
        parts = [self.model.family, self.model.base, f"k{half_keys}" if half_keys else "", f"s{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def run_name(self) -> str:
        """The run directory's name, `<slug>-<hash8>`."""
        return f"{self.slug}-{self.hash8}"


def with_current_names(cell: dict[str, Any]) -> dict[str, Any]:
    """The `cell` block of a record, which may be older than the last rename, under today's field names."""
    train = cell.get("train")
    if not isinstance(train, dict) or "optimizer" not in train:
        return cell
    renamed = {"table_optimizer" if name == "optimizer" else name: value for name, value in train.items()}
    return {**cell, "train": renamed}


def variants(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Run name -> the settings in which the cell is not as most cells of its family and base: what tells them apart.

    Dotted, without `model.`. Where no value is the most frequent each cell's own is given. Half keys and seeds stand in
    the run's name.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model.family, cell.model.base), []).append(cell)
    found: dict[str, dict[str, Any]] = {cell.run_name: {} for cell in cells}
    for members in groups.values():
        settings = {cell.run_name: flat(cell.model_dump(mode="json")) for cell in members}
        for key in {key for cell in members for key in flat(identity(cell, current_names=True))} - {
            "model.half_keys",
            "seed",
        }:
            values = {run: json.dumps(fields.get(key)) for run, fields in settings.items()}
            counts = Counter(values.values()).most_common(2)
            usual = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
            # A file is told by its place, which says more than what identifies its content.
            shown = key.replace("fingerprint", "path")
            for run, value in values.items():
                if value != usual:
                    found[run][shown.removeprefix("model.")] = settings[run].get(shown)
    return {run: dict(sorted(variant.items())) for run, variant in found.items()}


def described(run: str, variant: dict[str, Any]) -> str:
    """A run's name with what tells it apart on a line below, for tables."""
    said = " ".join(f"{key}={value}" for key, value in variant.items())
    return f"{run}\n  {said}" if said else run


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths; lists and scalars are values."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
