"""The tidy frame: one row per run x step x task x metric, with the columns of the design and no others.

Rows come from run directories (source `run`) and from published tables (source: the paper). What a run logs maps to
    training lines   split train   task train            metrics loss (training mode, nats per token), epoch
    probe lines      split probe   task eval             metrics nll (evaluation mode, nats per token), epoch
                                   task bios_<kind>      metrics bits, bits_max, nll, recall
    eval files       split final   task as evaluated     every metric, with stderr
    eval/steps       split steps   the same, of intermediate checkpoints
Columns of text are categorical.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from analysis.errors import InputError
from analysis.records import grid_data
from analysis.records.grid_data import unnest
from analysis.records.grids import read_grids, read_plans
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
]
TEXT = {
    "cell",
    "family",
    "base",
    "split",
    "task",
    "task_version",
    "metric",
    "run",
    "grids",
    "source",
    "confidence",
}
PUBLISHED = {
    "base_size": "base",
    "model_family": "family",
    "memory_keys": "memory_rows",
    "total_params": "params_total",
}
"""Column names in tables taken from papers -> ours."""
WHOLE = ("seed", "half_keys", "memory_rows", "params_total", "params_memory", "params_active", "tokens", "step", "n")
"""Columns of whole numbers: integers where none is missing."""
PROBED = ("bits", "bits_max", "nll", "recall")
"""Metrics of a probe, in the order of their rows."""
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
OF_RUN += ("params_active", "flops_per_token", "bytes_per_token", "macs_ratio", "params_ratio", "predicted_wall_s")
"""Columns that are the same in all rows of a run."""


@dataclass(frozen=True)
class Frame:
    """The frame, and the run and cause of every run that was left out because a record file cannot be read."""

    table: pd.DataFrame
    damaged: pd.DataFrame


def load(results: Path, grid: str | None, reference: str, published: bool = True) -> Frame:
    """The frame of a results folder: its runs and its published tables.

    Args:
        results: folder of runs/, grids/, plans/ and published/.
        grid: only the runs of this grid; None: all runs.
        reference: family whose plain model is the partner that ratios are relative to.
        published: whether to append the published tables.
    """
    names = {name: recorded.runs for name, recorded in read_grids(results).items()}
    columns = [name for name in grid_data.COLUMNS if name != "answers"]
    table = grid_data.read_store(results, grid, columns)
    runs, damaged = grid_data.run_table(table, read_plans(results))
    runs = grid_data.with_partners(runs, reference)
    position = grid_data.positions(runs, len(table))
    lists = {name: unnest(table, name, position) for name in ("lines", "probes", "scores")}
    parts = [_of_runs(runs, lists, names)] if len(runs) else []
    if published:
        parts.append(load_published(results))
    parts = [part for part in parts if len(part)]
    return Frame(_concatenated(parts, COLUMNS) if parts else _typed(pd.DataFrame()), damaged)


def load_published(results: Path) -> pd.DataFrame:
    """All published tables of a results folder, as one frame (empty without any)."""
    parts = [read_published(path) for path in sorted(results.glob("published/*.csv"))]
    return _concatenated(parts, COLUMNS) if parts else pd.DataFrame(columns=COLUMNS)


def _of_runs(runs: pd.DataFrame, lists: Mapping[str, pd.DataFrame], grids: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows of these runs: by run, then training and probe lines as logged, then final and intermediate scores."""
    lines = lists["lines"].assign(line=lambda table: table.groupby("run").cumcount())
    trained, evaluated = lines[lines["loss"].notna()], lines[lines["eval_loss"].notna()]
    parts = [
        _logged(trained, "train", "train", "loss", trained["loss"], 0),
        _logged(trained, "train", "train", "epoch", trained["epoch"], 1),
        _logged(evaluated, "probe", "eval", "nll", evaluated["eval_loss"], 2),
        _logged(evaluated, "probe", "eval", "epoch", evaluated["epoch"], 3),
        *_probed(lines, lists["probes"]),
        _final(runs, lists["scores"]),
        _intermediate(runs, lists["scores"]),
    ]
    columns = ["run", "line", "order", *WITHIN_A_RUN]
    rows = _concatenated([part for part in parts if len(part)] or parts[:1], columns)
    rows = rows.take(np.lexsort([rows["order"], rows["line"], rows["run"]])).reset_index(drop=True)
    at = rows["run"].to_numpy(int)
    shared = {name: _repeated(runs[name], at) for name in OF_RUN}
    shared["grids"] = _repeated(_memberships(runs["run"], grids), at)
    shared["source"] = _constant("run", len(at))
    return _typed(rows.drop(columns="run").assign(**shared))


WITHIN_A_RUN: tuple[str, ...] = (
    "step",
    "tokens",
    "train_flops",
    "wall_s",
    "tokens_per_s",
    "split",
    "task",
    "metric",
    "value",
)
WITHIN_A_RUN += ("task_version", "few_shot", "n", "stderr")
"""Columns that differ between the rows of a run."""
AFTER_ALL_LINES = 2**40


def _logged(lines: pd.DataFrame, split: str, task: str, metric: str, value: Any, order: Any) -> pd.DataFrame:
    """One row per logged line; `order` is its place among the rows of the line."""
    constants = {
        name: _constant(text, len(lines)) for name, text in (("split", split), ("task", task), ("metric", metric))
    }
    at = ["run", "line", "step", "tokens", "train_flops", "wall_s", "tokens_per_s"]
    return lines[at].assign(value=np.asarray(value, float), order=order, **constants)


def _probed(lines: pd.DataFrame, probes: pd.DataFrame) -> list[pd.DataFrame]:
    """One row per probe, kind and metric."""
    keys = pd.MultiIndex.from_frame(probes[["run", "line"]].astype(int))
    of_probe = lines.take(pd.MultiIndex.from_frame(lines[["run", "line"]]).get_indexer(keys))
    place = len(PROBED) * probes.groupby("run").cumcount().to_numpy()
    parts = []
    for kind in probes["kind"].unique():
        for number, metric in enumerate(PROBED):
            rows = ((probes["kind"] == kind) & probes[metric].notna()).to_numpy()
            values, order = probes.loc[rows, metric], 4 + place[rows] + number
            part = _logged(of_probe[rows], "probe", f"bios_{kind}", metric, values, order)
            parts.append(part.assign(n=probes.loc[rows, "n"].to_numpy()))
    return parts


def _final(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per final score, at the run's last values."""
    table = scores[scores["split"] == "final"].drop(columns="tokens")
    at = table["run"].to_numpy(int)
    ends = {name: runs[name].to_numpy(float)[at] for name in ("tokens", "train_flops", "wall_s", "tokens_per_s")}
    return _scored(table.assign(**ends), AFTER_ALL_LINES)


def _intermediate(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per score of an intermediate checkpoint."""
    table = scores[scores["split"] == "steps"]
    per_token = np.nan_to_num(runs["flops_per_token"].to_numpy(float)[table["run"].to_numpy(int)])
    tokens = table["tokens"].fillna(0)
    return _scored(table.assign(tokens=tokens, train_flops=tokens * per_token), AFTER_ALL_LINES + 1)


def _scored(table: pd.DataFrame, line: int) -> pd.DataFrame:
    """Scores as rows after all lines of their run, in the files' order."""
    table = table.rename(columns={"version": "task_version"}).assign(line=line, order=np.arange(len(table)))
    return table.astype(dict.fromkeys(("split", "task", "metric", "task_version"), "category"))


def _memberships(names: pd.Series, grids: Mapping[str, Sequence[str]]) -> pd.Series:
    """The grids of each run, separated by semicolons."""
    member: dict[str, list[str]] = {}
    for grid, runs in grids.items():
        for name in dict.fromkeys(runs):
            member.setdefault(name, []).append(grid)
    return names.map(lambda name: ";".join(member.get(name, ())))


def _constant(text: str, rows: int) -> pd.Categorical[str]:
    """One text in every row."""
    return pd.Categorical.from_codes(np.zeros(rows, np.int8), pd.Index([text]))


def _repeated(values: pd.Series, at: np.ndarray) -> Any:
    """A run's value in each of its rows; text as categories."""
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(float)[at]
    codes, texts = pd.factorize(values)
    return pd.Categorical.from_codes(codes[at], pd.Index(texts, dtype=object))


def _concatenated(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The rows of all parts, the categories of text columns united."""
    joined: dict[str, Any] = {}
    for name in columns:
        pieces = [part[name] if name in part else pd.Series(np.nan, index=part.index) for part in parts]
        if any(isinstance(piece.dtype, pd.CategoricalDtype) for piece in pieces):
            texts = [piece.astype(object).astype("category") if piece.isna().all() else piece for piece in pieces]
            texts = [text.cat.set_categories(text.cat.categories.astype(object)) for text in texts]
            joined[name] = union_categoricals(texts)
        else:
            joined[name] = np.concatenate([piece.to_numpy() for piece in pieces])
    return pd.DataFrame(joined)


def read_published(path: Path) -> pd.DataFrame:
    """A table of published numbers as a frame; its columns are the frame's or the papers' names for them."""
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
    """A count as papers write it: 1.3b, 984m, 512k, 1T, 15,000; NaN for anything else."""
    match = re.fullmatch(r"\s*([0-9][0-9,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbt]?)\s*", str(text).lower())
    if not match:
        return float("nan")
    scale = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2]]
    return round(float(match[1].replace(",", "")) * scale, 6)  # 4.1b is no 4,099,999,999.9999995


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Exactly the columns of the frame: text as categories, everything else as numbers."""
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
