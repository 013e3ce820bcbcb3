"""The tidy frame: one row per run x step x task x metric, whose columns docs/records.md explains.

Rows come from run directories (source `run`) and from published tables (source: the paper). What a run logs maps to
    training lines   split train   task train            metrics loss (training mode, nats per token), epoch
    probe lines      split probe   task eval             metrics nll (evaluation mode, nats per token), epoch
                                   task bios_<kind>      metrics bits, bits_max, nll, recall
                     split averaged    the same, of the average of the weights (train.probe_average), without epoch
    eval files       split final   task as evaluated     every metric, with stderr
                     split table_off   the same, with value tables switched off (evaluate.table_off)
    eval/steps       split steps   the same, of intermediate checkpoints
Columns of text are categorical.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.errors import InputError
from analysis.records.columns import TEXT, Columns, Vocabularies, Vocabulary, missing, values_of
from analysis.records.grids import read_grids, read_plans
from analysis.records.runs.rows import Rows
from analysis.records.runs.table import positions, read_store, run_table, with_partners
from analysis.records.tables import read_table

COLUMNS = [
    "cell",
    "family",
    "base",
    "seed",
    "half_keys",
    "memory_rows",
    "params_total",
    "params_memory",
    "params_active",
    "flops_per_token",
    "bytes_per_token",
    "tokens",
    "train_flops",
    "wall_s",
    "tokens_per_s",
    "step",
    "split",
    "task",
    "task_version",
    "few_shot",
    "metric",
    "value",
    "stderr",
    "n",
    "run",
    "grids",
    "macs_ratio",
    "params_ratio",
    "predicted_wall_s",
    "source",
    "confidence",
    "params_embedding",
    "precision",
]
PUBLISHED = {
    "base_size": "base",
    "model_family": "family",
    "memory_keys": "memory_rows",
    "total_params": "params_total",
}
"""Column names in tables taken from papers -> ours."""
WHOLE = (
    "seed",
    "half_keys",
    "memory_rows",
    "params_total",
    "params_memory",
    "params_active",
    "tokens",
    "step",
    "n",
    "params_embedding",
)
"""Columns of whole numbers: integers where none is missing."""
OF_RUN: tuple[str, ...] = (
    "cell",
    "run",
    "family",
    "base",
    "seed",
    "half_keys",
    "memory_rows",
    "params_total",
    "params_memory",
)
OF_RUN += (
    "grids",
    "params_active",
    "flops_per_token",
    "bytes_per_token",
    "macs_ratio",
    "params_ratio",
    "predicted_wall_s",
    "params_embedding",
    "source",
)
"""Columns that are the same in all rows of a run."""
STORED: tuple[str, ...] = (
    "cell",
    "hash",
    "account",
    "state",
    "cause",
    "tokens",
    "train_flops",
    "wall_s",
    "tokens_per_s",
)
STORED += ("lines", "probes", "scores")
"""Columns of the store that the frame is made of."""


@dataclass(frozen=True)
class Part:
    """Some rows of the frame.

    Attributes:
        rows: Columns with a value per row.
        run: Position of the run of each row in `of_runs`.
        of_runs: Columns with a value per run.
    """

    rows: Columns
    run: np.ndarray
    of_runs: Columns

    def column(self, name: str) -> np.ndarray:
        """Return a column of the frame, one value per row."""
        if name in self.of_runs:
            return self.of_runs[name][self.run]
        return self.rows[name] if name in self.rows else missing(name, len(self.run))


@dataclass(frozen=True)
class Frame:
    """The frame, made part by part when it is needed, so that the parts reuse the same memory.

    Attributes:
        rows: The rows of runs.
        of_runs: The columns that are the same in all rows of a run.
        published: The rows of published tables.
        texts: The texts of all columns.
        left_out: Run and cause of every run of which a record file cannot be read, or that is a copy of another.
    """

    rows: Rows | None
    of_runs: Columns
    published: Sequence[Part]
    texts: Vocabularies
    left_out: pd.DataFrame

    def tables(self) -> Iterator[pa.Table]:
        """Yield the frame in parts with the same types; whole numbers are integers where none is missing."""
        whole = set(WHOLE) - self._incomplete()
        for part in self._parts():
            columns: dict[str, pa.Array] = {}
            for name in COLUMNS:
                values = part.column(name)
                if name in TEXT:
                    columns[name] = self.texts[name].encoded(values)
                else:
                    numbers = values.astype(np.int64 if name in whole else np.float64, copy=False)
                    columns[name] = pa.array(numbers, from_pandas=True)
            yield pa.table(columns)

    def _parts(self) -> Iterator[Part]:
        for columns in self.rows.parts() if self.rows else ():
            yield Part(columns, columns.pop("run"), self.of_runs)
        yield from self.published

    def _incomplete(self) -> set[str]:
        """Return the columns of whole numbers that some row lacks."""
        incomplete = {name for part in self.published for name in WHOLE if np.isnan(part.column(name)).any()}
        if self.rows is None:
            return incomplete
        runs = self.rows.runs
        of_runs = {name for name in WHOLE if name in self.of_runs and np.isnan(self.of_runs[name][runs]).any()}
        return incomplete | of_runs | self.rows.incomplete()

    @cached_property
    def table(self) -> pd.DataFrame:
        """The whole frame; text is categorical."""
        return pa.concat_tables(self.tables()).to_pandas()


def load(results: Path, grid: str | None, reference: str, published: bool = True) -> Frame:
    """Return the frame of a results folder: its runs and its published tables.

    Args:
        results: Folder of runs/, grids/, plans/ and published/.
        grid: Only the runs of this grid; None: all runs.
        reference: Family whose plain model is the partner that ratios are relative to.
        published: Whether to append the published tables.
    """
    names = {name: recorded.runs for name, recorded in read_grids(results).items()}
    table = read_store(results, grid, STORED)
    runs, left_out = run_table(table, read_plans(results))
    runs = with_partners(runs, reference).assign(grids=_memberships(runs["run"], names), source="run")
    texts = {name: Vocabulary() for name in TEXT}
    of_runs = values_of(runs[list(OF_RUN)], texts)
    rows = Rows(table, runs, positions(runs, len(table)), texts)
    return Frame(rows, of_runs, _published_parts(results, texts) if published else [], texts, left_out)


def load_published(results: Path) -> pd.DataFrame:
    """Return all published tables of a results folder, as one frame (empty without any)."""
    texts = {name: Vocabulary() for name in TEXT}
    parts = _published_parts(results, texts) or [Part({}, np.array([], int), {})]
    return Frame(None, {}, parts, texts, pd.DataFrame()).table


def _published_parts(results: Path, texts: Vocabularies) -> list[Part]:
    tables = [read_published(path) for path in sorted(results.glob("published/*.csv"))]
    return [Part(values_of(table, texts), np.arange(len(table)), {}) for table in tables]


def _memberships(names: pd.Series, grids: Mapping[str, Sequence[str]]) -> pd.Series:
    """Return the grids of each run, separated by semicolons."""
    member: dict[str, list[str]] = {}
    for grid, runs in grids.items():
        for name in dict.fromkeys(runs):
            member.setdefault(name, []).append(grid)
    return names.map(lambda name: ";".join(member.get(name, ())))


def read_published(path: Path) -> pd.DataFrame:
    """Return a table of published numbers as a frame; its columns are the frame's or the papers' names for them."""
    table = read_table(path)
    missing = {"source", "task", "metric", "value"} - set(table.columns)
    if missing:
        raise InputError(
            f"{path}: columns {', '.join(sorted(missing))} are missing, needed: source, task, metric, value"
        )
    table = table.rename(columns={key: name for key, name in PUBLISHED.items() if name not in table.columns})
    if "split" not in table.columns:
        table["split"] = "published"
    for column in ("params_total", "tokens"):
        if column in table.columns:
            table[column] = [amount(value) for value in table[column]]
    return _typed(table)


def amount(text: object) -> float:
    """Return a count as papers write it: 1.3b, 984m, 512k, 1T, 15,000; NaN for anything else."""
    match = re.fullmatch(r"\s*([0-9][0-9,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]?)\s*", str(text).lower())
    if not match:
        return float("nan")
    scale = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]]
    return round(float(match[1].replace(",", "")) * scale, 6)  # 4.1b is no 4,099,999,999.9999995


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Return exactly the columns of the frame: text as categories, everything else as numbers."""
    table = table.reindex(columns=COLUMNS)
    for column in COLUMNS:
        if column not in TEXT:
            table[column] = pd.to_numeric(table[column], errors="coerce")
            if column in WHOLE and table[column].notna().all():
                table[column] = table[column].astype(np.int64)
        elif not isinstance(table[column].dtype, pd.CategoricalDtype):
            text = table[column].astype(object).where(table[column].notna(), None)
            table[column] = pd.Categorical([None if value is None else str(value) for value in text])
    return table
