"""A cell: one point of a grid, frozen, fully explicit and content-hashed.

The hash of a cell identifies its run. It covers everything that makes the weights (model, data, training, seed,
threads, the source of an external baseline) and leaves out fields at their default, so that adding a field to the
schema changes no existing hash. Evaluations have hashes of their own.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator
from pydantic.functional_validators import BeforeValidator

from suite.data.sources.registry import AnyData
from suite.identity import NOT_IDENTITY, Frozen, identity
from suite.models import registry
from suite.models.memory_table import RowForm
from suite.models.registry import ModelConfig
from suite.trainable import EVERYTHING, AnyTrainable

ROW_WISE_OPTIONS = ("value_precision", "value_second_moment", "value_replay_limit", "value_lazy")
"""Fields of TrainConfig that configure `table_optimizer: row_wise` (docs/training.md)."""


LoggerName = Literal["tensorboard", "wandb"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Frozen):
    """Budget, optimizers, precision, and what is logged and saved. Set exactly one of `tokens` and `epochs`."""

    batch_rows: int = Field(gt=0, description="rows of seq_len tokens per optimizer step")
    tokens: int | None = Field(default=None, ge=0, lt=2**63, description="training tokens, padding included")
    epochs: float | None = Field(
        default=None, gt=0, lt=1e18, description="passes over the data; for bios: exposures per fact"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    value_lr: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate of value tables; None: ten times lr (released template), five times for engram",
    )
    value_lr_end: float | None = Field(
        default=None,
        ge=0,
        description="factor on value_lr at the end, reached linearly and multiplied by the schedule; None: 1, and 1/4 "
        "for ultramem_v2",
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
    table_device: Literal["model", "host"] = Field(
        default="model",
        json_schema_extra=NOT_IDENTITY,
        description="memory that holds value tables and their moments in training: that of the model's device, or the "
        "host's, from which the rows of each read are copied",
    )
    value_precision: Literal["fp32", "bf16", "bf16_master", "bf16_stochastic"] = Field(
        default="fp32",
        description="storage of value tables: fp32, or bf16 rounded to nearest, with an fp32 master copy, or "
        "stochastically rounded",
    )
    value_second_moment: Literal["element", "row"] = Field(
        default="element", description="second moment of value tables: per element, or one per row (its mean square)"
    )
    value_replay_limit: int | None = Field(
        default=None,
        gt=0,
        description="maximum number of skipped steps replayed per row; None: all on a CPU, 256 on a GPU",
    )
    value_lazy: bool = Field(default=False, description="do not update unread rows (LazyAdam)")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay, of every parameter")
    value_weight_decay: float | None = Field(
        default=None, ge=0, description="weight decay of value tables; None: weight_decay, and 0 for engram"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="AdamW's betas")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="linear", description="learning rate after warm-up; wsd: constant, then a decay at the end"
    )
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    final_lr: float = Field(
        default=0.01, ge=0, le=1, description="final learning rate as a fraction of lr (linear, cosine, wsd)"
    )
    decay: float = Field(default=0.2, gt=0, le=1, description="wsd: fraction of the steps in the final decay")
    decay_shape: Literal["1-sqrt", "linear"] = Field(default="1-sqrt", description="wsd: shape of the decay")
    branches: tuple[int, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NOT_IDENTITY,
        description="wsd: token budgets, this cell's included, of the cells that share one stable phase",
    )
    clip: float | None = Field(
        default=1.0,
        gt=0,
        description="gradient-clipping norm; value tables and all other parameters are clipped separately; None: off",
    )
    accumulate: int = Field(default=1, gt=0, description="micro-batches per step; divides batch_rows")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16: autocast over fp32 weights")
    compile: bool = Field(default=False, description="compile the model with torch.compile")
    probes: int = Field(default=0, ge=0, description="number of log-spaced probes (bits learned) during training")
    probe_average: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="also probe the average of the weights, whose mean age is this share of the steps taken",
    )
    stop_past: float | None = Field(
        default=None, gt=0, lt=1, description="stop after two probes in a row above this fraction of all bits"
    )
    init_from: str | None = Field(
        default=None,
        json_schema_extra=NOT_IDENTITY,
        description="run to start from: a name under the grid's `parents`, a run's name or path; None: new weights",
    )
    parent: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{8}$", description="hash of the run that init_from names; filled in"
    )
    probe_every: int | None = Field(
        default=None, gt=0, description="new facts: steps between measurements of learning and forgetting"
    )
    trainable: AnyTrainable = Field(default=EVERYTHING, description="which parameters move")
    log_every: int = Field(default=10, gt=0, json_schema_extra=NOT_IDENTITY, description="steps between log lines")
    loggers: tuple[LoggerName, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=NOT_IDENTITY,
        description="also log to tensorboard, wandb (extras of the package); train.jsonl is always written",
    )
    checkpoint_every: int = Field(
        default=200, gt=0, json_schema_extra=NOT_IDENTITY, description="steps between checkpoints"
    )
    keep_checkpoints: int = Field(
        default=2, gt=0, json_schema_extra=NOT_IDENTITY, description="number of most recent checkpoints to retain"
    )
    evaluate_every: int | None = Field(
        default=None,
        gt=0,
        json_schema_extra=NOT_IDENTITY,
        description="evaluate every N steps during training; a multiple of checkpoint_every",
    )

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "optimizer" in fields:
            raise ValueError("train.optimizer: renamed to table_optimizer")
        return fields

    def problems(self) -> list[tuple[str, object, str]]:
        """Return inconsistencies between fields: (field, value, what is allowed)."""
        problems: list[tuple[str, object, str]] = []
        if (self.tokens is None) == (self.epochs is None):
            problems.append(("tokens", self.tokens, "exactly one of tokens and epochs"))
        if self.batch_rows % self.accumulate:
            problems.append(("accumulate", self.accumulate, f"a divisor of batch_rows ({self.batch_rows})"))
        problems += self._table_problems()
        if self.branches and (self.schedule != "wsd" or self.tokens not in self.branches):
            problems.append(("branches", self.branches, "token budgets that include train.tokens, with schedule wsd"))
        if self.branches and self.stop_past is not None:
            problems.append(("stop_past", self.stop_past, "None with branches, which end at their budgets"))
        if self.parent is not None and self.init_from is None:
            problems.append(("parent", self.parent, "None without init_from, which names the run"))
        problems += self._trainable_problems()
        problems += self._average_problems()
        if self.evaluate_every is not None and self.evaluate_every % self.checkpoint_every:
            allowed = f"a multiple of checkpoint_every ({self.checkpoint_every})"
            problems.append(("evaluate_every", self.evaluate_every, allowed))
        return problems

    def _average_problems(self) -> list[tuple[str, object, str]]:
        if self.probe_average is None:
            return []
        problems: list[tuple[str, object, str]] = []
        if self.probes == 0:
            problems.append(("probe_average", self.probe_average, "None without train.probes"))
        if self.value_precision != "fp32":
            problems.append(("value_precision", self.value_precision, "fp32 with probe_average"))
        if self.trainable.kind == "lora":
            problems.append(("probe_average", self.probe_average, "None with trainable lora"))
        return problems

    def _trainable_problems(self) -> list[tuple[str, object, str]]:
        kind = self.trainable.kind
        problems: list[tuple[str, object, str]] = []
        if kind != "all" and self.init_from is None:
            problems.append(("trainable.kind", kind, "all without init_from"))
        if kind == "lora" and self.matrix_optimizer != "adamw":
            problems.append(("matrix_optimizer", self.matrix_optimizer, "adamw with trainable lora"))
        if kind == "rows" and self.table_optimizer == "dense":
            problems.append(("table_optimizer", "dense", "row_wise, sgd with trainable rows"))
        if kind == "rows" and self.table_optimizer == "row_wise" and not self.value_lazy:
            problems.append(("value_lazy", False, "true with trainable rows, so that no other row moves"))
        return problems + [
            (f"trainable.{field}", value, allowed) for field, value, allowed in self.trainable.problems()
        ]

    def _table_problems(self) -> list[tuple[str, object, str]]:
        problems: list[tuple[str, object, str]] = []
        if self.table_optimizer != "row_wise":
            for name in ROW_WISE_OPTIONS:
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default:
                    problems.append((name, value, f"{default} with table_optimizer {self.table_optimizer}"))
        if self.table_device == "host" and self.table_optimizer == "dense":
            problems.append(("table_device", "host", "model with table_optimizer dense, which reads all rows"))
        if self.table_optimizer == "sgd" and self.value_lr is None:
            problems.append(("value_lr", None, "a learning rate for table_optimizer sgd, which has no default"))
        limit = self.value_replay_limit
        if self.value_lazy and limit is not None:
            problems.append(("value_replay_limit", limit, "None with value_lazy, which replays nothing"))
        return problems


class EvalConfig(Frozen):
    """Evaluation tasks for a finished run, scored through lm-eval and hashed separately from the run."""

    tasks: tuple[str, ...] = Field(strict=False, min_length=1, description="names of tasks")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples per prompt; None: the task's default")
    limit: int | None = Field(default=None, gt=0, description="score only the first N documents of each task")
    table_off: bool = Field(
        default=False, description="read every table row as zeros, to see what each task loses; recorded separately"
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        default="fp32",
        description="matrix products: fp32; fp32 rounded to tf32 (GPUs only); or autocast to bf16. Scores of different "
        "precision are never paired",
    )

    @property
    def settings(self) -> tuple[int | None, int | None, bool, str]:
        """Everything but the tasks."""
        return self.num_fewshot, self.limit, self.table_off, self.precision

    @property
    def hash8(self) -> str:
        """Eight hex digits of this evaluation's identity."""
        return _evaluation_hash(self)


@functools.cache
def _evaluation_hash(config: EvalConfig) -> str:
    """Return the hash of an evaluation; the cells of a grid have few different ones."""
    return _digest(identity(config))


def _model_config(value: Any) -> ModelConfig:
    """Validate the `model` block with the options class of its family."""
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a mapping with at least family and base")
    return registry.family(value.get("family")).config.model_validate(value)


class Cell(Frozen):
    """One model x data x training x seed, with its evaluations."""

    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_model_config)]
    data: AnyData
    train: TrainConfig
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of initial weights and data order")
    threads: int = Field(default=1, gt=0, description="CPU threads; part of the identity, since sums depend on it")
    imported: str | None = Field(
        default=None, description="sha256 of the weights of an imported checkpoint, not trained here; filled in"
    )
    quantised: RowForm | None = Field(
        default=None,
        description="form of the tables' rows; the run is made from that of the same cell without this field, and not "
        "trained; None: fp32",
    )
    kept_rows: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of each table's rows that is retained, those that training text reads most; others read as "
        "zeros; the run is made as with quantised; None: all",
    )
    baseline: str | None = Field(default=None, description="sha256 of an external baseline's source; filled in")
    evaluate: tuple[EvalConfig, ...] = Field(default=(), strict=False, json_schema_extra=NOT_IDENTITY)

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        for name, part in (
            ("model", self.model),
            ("data", self.data),
            ("train", self.train),
            ("data.tokenizer", self.data.tokenizer),
        ):
            for field, value, allowed in part.problems():
                raise ValueError(f"{name}.{field}: got {value!r}, allowed: {allowed}")
        end = self.model.value_lr_end if self.train.value_lr_end is None else self.train.value_lr_end
        if self.train.branches and self.model.has_tables and end != 1.0:
            raise ValueError(f"train.value_lr_end: got {end}, allowed: 1.0 with branches, which share first steps")
        if any(config.table_off for config in self.evaluate) and not self.model.has_tables:
            raise ValueError("evaluate.table_off: got True, allowed: False for a model without value tables")
        if (self.train.tokens == 0 or not self.data.has_text) and self.imported is None:
            field, value = ("train.tokens", 0) if self.train.tokens == 0 else ("data.kind", self.data.kind)
            raise ValueError(f"{field}: got {value!r}, allowed: for imported checkpoints only")
        rows_per_fact = self.data.rows_per_fact
        if rows_per_fact is not None and self.train.batch_rows % rows_per_fact:
            allowed = f"a multiple of data.paraphrases ({rows_per_fact}), whole facts"
            raise ValueError(f"train.batch_rows: got {self.train.batch_rows}, allowed: {allowed}")
        if rows_per_fact is None and self.train.probe_every is not None:
            raise ValueError(f"train.probe_every: got {self.train.probe_every}, allowed: None without new facts")
        for field in ("quantised", "kept_rows"):
            if (value := getattr(self, field)) is not None and not self.model.has_tables:
                raise ValueError(f"{field}: got {value!r}, allowed: None for a model without value tables")
        return self

    def with_evaluations(self, configs: tuple[EvalConfig, ...]) -> Cell:
        """Return the cell with more evaluations, skipping tasks that it already has with the same settings."""
        evaluations = self.evaluate
        for config in configs:
            present = {task for other in evaluations if other.settings == config.settings for task in other.tasks}
            if new := tuple(task for task in dict.fromkeys(config.tasks) if task not in present):
                evaluations += (config.model_copy(update={"tasks": new}),)
        return self.model_copy(update={"evaluate": evaluations})

    @property
    def source(self) -> Cell | None:
        """The cell whose run this one is made from; None if it is trained."""
        if self.quantised is None and self.kept_rows is None:
            return None
        return self.model_copy(update={"quantised": None, "kept_rows": None})

    @functools.cached_property
    def hash8(self) -> str:
        """Eight hex digits of the run's identity."""
        return _digest(identity(self))

    def starting_from(self, parent: str, init_from: str | None = None) -> Cell:
        """Return the cell with another parent, given by its hash; `init_from` may name it differently."""
        named = {"parent": parent, "init_from": init_from or self.train.init_from}
        return self.model_copy(update={"train": self.train.model_copy(update=named)})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values; its hash and name are computed anew."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("hash8", "run_name"):
            copied.__dict__.pop(name, None)
        return copied

    @property
    def slug(self) -> str:
        """A readable name: family, base size, half keys (if any), seed, form of quantised rows and percentage of
        retained ones; layers and width of an imported model."""
        if self.imported is not None:
            return f"imported-{self.model.size.layers}x{self.model.size.dim}"
        half_keys = self.model.table_side
        parts = [self.model.family, self.model.base, f"k{half_keys}" if half_keys else "", f"s{self.seed}"]
        parts += [self.quantised or "", f"keep{100 * self.kept_rows:g}" if self.kept_rows else ""]
        return "-".join(part for part in parts if part)

    @functools.cached_property
    def run_name(self) -> str:
        """The run directory's name, `<slug>-<hash8>`."""
        return f"{self.slug}-{self.hash8}"


def with_current_names(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the `cell` block of a record under current field names; the record may be older than a rename."""
    train = cell.get("train")
    if not isinstance(train, dict) or "optimizer" not in train:
        return cell
    renamed = {"table_optimizer" if name == "optimizer" else name: value for name, value in train.items()}
    return {**cell, "train": renamed}


def variants(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return the settings that distinguish each cell, by run name.

    These are the settings that differ from the most common value within the same family and base size; if no value is
    the most common, every cell's own. Names are dotted, without `model.`. Half keys and seeds are left out, since the
    run name has them.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model.family, cell.model.base), []).append(cell)
    distinct: dict[str, dict[str, Any]] = {cell.run_name: {} for cell in cells}
    for members in groups.values():
        settings = {cell.run_name: flat(cell.model_dump(mode="json")) for cell in members}
        keys = {key for cell in members for key in flat(identity(cell, current_names=True))}
        if "train.parent" in keys:  # the name of a parent is easier to recognise, and equal for all seeds
            keys = (keys - {"train.parent"}) | {"train.init_from"}
        for key in keys - {"model.half_keys", "seed"}:
            values = {run: json.dumps(fields.get(key)) for run, fields in settings.items()}
            counts = Counter(values.values()).most_common(2)
            usual = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else None
            # A path is easier to recognise than the hash of its content.
            shown = key.replace("_fingerprint", "").replace("fingerprint", "path")
            for run, value in values.items():
                if value != usual:
                    distinct[run][shown.removeprefix("model.")] = settings[run].get(shown)
    return {run: dict(sorted(variant.items())) for run, variant in distinct.items()}


def display_name(run: str, variant: dict[str, Any]) -> str:
    """Return a run's name and, on a second line, the settings that distinguish it."""
    settings = " ".join(f"{key}={value}" for key, value in variant.items())
    return f"{run}\n  {settings}" if settings else run


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one mapping with dotted keys; lists and scalars are values."""
    flattened: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
