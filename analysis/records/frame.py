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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from analysis.errors import InputError
from analysis.records.grids import read_grids, read_plans
from analysis.records.run_files import AVERAGED
from analysis.records.runs.table import COLUMNS as STORED
from analysis.records.runs.table import positions, read_store, run_table, with_partners
from analysis.records.store import unnest
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
    "precision",
}
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
OF_RUN += (
    "grids",
    "params_active",
    "flops_per_token",
    "bytes_per_token",
    "macs_ratio",
    "params_ratio",
    "predicted_wall_s",
    "params_embedding",
)
"""Columns that are the same in all rows of a run."""
RUNS = 2500
"""Runs whose rows are made at once, so that intermediate arrays stay small."""


@dataclass(frozen=True)
class Frame:
    """The frame, and the run and cause of every run that was left out because a record file cannot be read."""

    table: pd.DataFrame
    damaged: pd.DataFrame


def load(results: Path, grid: str | None, reference: str, published: bool = True) -> Frame:
    """Return the frame of a results folder: its runs and its published tables.

    Args:
        results: Folder of runs/, grids/, plans/ and published/.
        grid: Only the runs of this grid; None: all runs.
        reference: Family whose plain model is the partner that ratios are relative to.
        published: Whether to append the published tables.
    """
    names = {name: recorded.runs for name, recorded in read_grids(results).items()}
    columns = [name for name in STORED if name != "answers"]
    table = read_store(results, grid, columns)
    runs, damaged = run_table(table, read_plans(results))
    runs = with_partners(runs, reference)
    position = positions(runs, len(table))
    lists = {name: unnest(table, name, position) for name in ("lines", "probes", "scores")}
    runs = runs.assign(grids=_memberships(runs["run"], names))
    parts = [
        _of_runs(runs, {name: _between(entries, first, first + RUNS) for name, entries in lists.items()})
        for first in range(0, len(runs), RUNS)
    ]
    if published:
        parts += _published_parts(results)
    return Frame(_framed(_concatenated(parts, COLUMNS)), damaged)


def load_published(results: Path) -> pd.DataFrame:
    """Return all published tables of a results folder, as one frame (empty without any)."""
    return _framed(_concatenated(_published_parts(results), COLUMNS))


def _published_parts(results: Path) -> list[Columns]:
    return [_columns_of(read_published(path)) for path in sorted(results.glob("published/*.csv"))]


def _between(entries: pd.DataFrame, first: int, end: int) -> pd.DataFrame:
    """Return the entries of the runs from `first` up to `end`."""
    start, stop = np.searchsorted(entries["run"].to_numpy(), [first, end])
    return entries.iloc[start:stop].reset_index(drop=True)


def _of_runs(runs: pd.DataFrame, lists: Mapping[str, pd.DataFrame]) -> Columns:
    """Return the rows of the runs in these lists: by run, then logged lines in order, then final and intermediate
    scores."""
    lines = lists["lines"].assign(line=lambda table: table.groupby("run").cumcount())
    trained, evaluated = lines[lines["loss"].notna()], lines[lines["eval_loss"].notna()]
    averaged = lines[lines["averaged_eval_loss"].notna()]
    last = int(lines["line"].max()) if len(lines) else 0
    parts = [
        _logged(trained, "train", "train", "loss", trained["loss"], 0),
        _logged(trained, "train", "train", "epoch", trained["epoch"], 1),
        _logged(evaluated, "probe", "eval", "nll", evaluated["eval_loss"], 2),
        _logged(evaluated, "probe", "eval", "epoch", evaluated["epoch"], 3),
        _logged(averaged, "averaged", "eval", "nll", averaged["averaged_eval_loss"], 4),
        *_probed(lines, lists["probes"]),
        _final(runs, lists["scores"], last + 1),
        _intermediate(runs, lists["scores"], last + 2),
    ]
    rows = _concatenated(parts, ["at", "line", "order", *WITHIN_A_RUN])
    run, line, order = (rows.pop(name).astype(np.int64) for name in ("at", "line", "order"))
    place = (run * (last + 3) + line) * (int(order.max(initial=0)) + 1) + order
    sorted_rows = np.argsort(place, kind="stable")
    at = run[sorted_rows]
    shared = {name: _repeated(runs[name], at) for name in OF_RUN}
    shared["source"] = _constant("run", len(at))
    return {name: values.take(sorted_rows) for name, values in rows.items()} | shared


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
WITHIN_A_RUN += ("task_version", "few_shot", "n", "stderr", "precision")
"""Columns that differ between the rows of a run."""
Columns = dict[str, Any]
"""Column -> NumPy array, or Categorical where it is in TEXT."""


def _logged(lines: pd.DataFrame, split: str, task: str, metric: str, value: Any, order: Any) -> Columns:
    """Return one row per logged line; `order` is its place among the rows of the line."""
    at = ("line", "step", "tokens", "train_flops", "wall_s", "tokens_per_s")
    constants = {name: _constant(text, len(lines)) for name, text in (("split", split), ("task", task))}
    constants["metric"] = _constant(metric, len(lines))
    values = {
        "at": lines["run"].to_numpy(),
        "value": np.asarray(value, float),
        "order": np.broadcast_to(order, len(lines)),
    }
    return {name: lines[name].to_numpy() for name in at} | values | constants


def _probed(lines: pd.DataFrame, probes: pd.DataFrame) -> list[Columns]:
    """Return one row per probe, kind and metric."""
    first = np.searchsorted(lines["run"].to_numpy(), probes["run"].to_numpy())
    of_probe = lines.take(first + probes["line"].to_numpy(int))
    place = len(PROBED) * probes.groupby("run").cumcount().to_numpy()
    parts = []
    for kind in probes["kind"].unique():
        of_kind = (probes["kind"] == kind).to_numpy()
        split = "averaged" if kind.startswith(AVERAGED) else "probe"
        task = f"bios_{kind.removeprefix(AVERAGED)}"
        for number, metric in enumerate(PROBED):
            rows = of_kind & probes[metric].notna().to_numpy()
            values, order = probes[metric].to_numpy()[rows], 5 + place[rows] + number
            part = _logged(of_probe[rows], split, task, metric, values, order)
            parts.append(part | {"n": probes["n"].to_numpy()[rows]})
    return parts


def _final(runs: pd.DataFrame, scores: pd.DataFrame, line: int) -> Columns:
    """Return one row per final score, at the run's last values."""
    table = scores[scores["split"].isin(("final", "table_off"))].drop(columns="tokens")
    at = table["run"].to_numpy(int)
    ends = {name: runs[name].to_numpy(float)[at] for name in ("tokens", "train_flops", "wall_s", "tokens_per_s")}
    return _scored(table.assign(**ends), line)


def _intermediate(runs: pd.DataFrame, scores: pd.DataFrame, line: int) -> Columns:
    """Return one row per score of an intermediate checkpoint."""
    table = scores[scores["split"] == "steps"]
    per_token = np.nan_to_num(runs["flops_per_token"].to_numpy(float)[table["run"].to_numpy(int)])
    tokens = table["tokens"].fillna(0)
    return _scored(table.assign(tokens=tokens, train_flops=tokens * per_token), line)


def _scored(table: pd.DataFrame, line: int) -> Columns:
    """Return scores as rows after all lines of their run, in the files' order."""
    return _columns_of(
        table.rename(columns={"version": "task_version", "run": "at"}).assign(line=line, order=range(len(table)))
    )


def _columns_of(table: pd.DataFrame) -> Columns:
    """Return the columns of a table, text as categories."""
    names = [str(name) for name in table]
    return {name: table[name].astype("category").array if name in TEXT else table[name].to_numpy() for name in names}


def _memberships(names: pd.Series, grids: Mapping[str, Sequence[str]]) -> pd.Series:
    """Return the grids of each run, separated by semicolons."""
    member: dict[str, list[str]] = {}
    for grid, runs in grids.items():
        for name in dict.fromkeys(runs):
            member.setdefault(name, []).append(grid)
    return names.map(lambda name: ";".join(member.get(name, ())))


def _constant(text: str, rows: int) -> pd.Categorical[str]:
    """Return one text in every row."""
    return pd.Categorical.from_codes(np.zeros(rows, np.int8), pd.Index([text]))


def _repeated(values: pd.Series, at: np.ndarray) -> Any:
    """Return a run's value in each of its rows; text as categories."""
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(float)[at]
    codes, texts = pd.factorize(values)
    return pd.Categorical.from_codes(codes[at], pd.Index(texts, dtype=object))


def _concatenated(parts: Sequence[Columns], columns: Sequence[str]) -> Columns:
    """Return the rows of all parts, the categories of text united and columns that a part lacks filled with NaN."""
    return {name: _joined([_column(part, name) for part in parts], name in TEXT) for name in columns}


def _column(part: Columns, name: str) -> Any:
    """Return a column of a part, or one without any value."""
    rows = len(part["metric"])
    if name not in TEXT:
        return part.get(name, np.full(rows, np.nan))
    texts = part.get(name, pd.Categorical.from_codes(np.full(rows, -1, np.int8), pd.Index([], dtype=object)))
    return pd.Categorical.from_codes(texts.codes, texts.categories.astype(object))


def _joined(pieces: Sequence[Any], text: bool) -> Any:
    if not pieces:
        return pd.Categorical([]) if text else np.array([])
    return union_categoricals(list(pieces)) if text else np.concatenate(pieces)


def _framed(columns: Columns) -> pd.DataFrame:
    """Return the frame of these columns; whole numbers are integers where none is missing."""
    for name in WHOLE:
        if len(columns[name]) and not np.isnan(columns[name].astype(float)).any():
            columns[name] = columns[name].astype(np.int64)
    return pd.DataFrame(columns, copy=False)


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
