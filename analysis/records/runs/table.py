"""The runs of a store as a table: what each run is, what it cost, and its ratios to its partner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.records import store
from analysis.records.grids import read_grid, read_source
from analysis.records.run_files import DAMAGED
from analysis.records.runs.labels import AFTER_TRAINING, is_reshaped, pairing, training

ACCOUNT = {
    "params_total": "params_total",
    "params_active": "params_active",
    "params_memory": "params_memory",
    "params_embedding": "params_embedding",
    "macs": "macs_total",
    "flops_per_token": "flops_per_token",
    "bytes_per_token": "bytes_per_token",
}
"""Column -> field of a run's account."""
RATIOS = {"macs_ratio": "macs", "params_ratio": "params_total", "bytes_ratio": "bytes_per_token"}
COLUMNS = (
    "cell",
    "hash",
    "account",
    "versions",
    "state",
    "cause",
    "usage_used",
    "usage_kl_bits",
    "tokens_per_s",
    "cpu_share",
    "tokens",
    "epoch",
    "train_flops",
    "wall_s",
    "eval_loss",
    "recent_loss",
    "lines",
    "probes",
    "table_use",
    "hit_rates",
    "scores",
    "answers",
    "knowledge",
    "retention",
    "smaller_tables",
)


def read_store(results: Path, grid: str | None, columns: Sequence[str]) -> pa.Table:
    """Return the run table of a results folder, or of one grid in it.

    Args:
        results: The results folder.
        grid: A grid; None: all runs.
        columns: Columns of the store to read.

    Raises:
        InputError: An unknown grid, or no run at all.
    """
    table = store.load(results, columns, None if grid is None else read_grid(results, grid).runs)
    if not len(table):
        source = "smoke" if grid is None else read_source(results, grid)
        raise InputError(f"{results / 'runs'}: no runs here; make some: suite sweep {source}")
    return table


def run_table(table: pa.Table, predicted: Mapping[str, float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the readable runs of a store in its order, and run and cause of the damaged ones and of copies.

    `stored` is the row of a run in the store, `settings` its cell.
    """
    flat = table.select([name for name in table.column_names if not pa.types.is_list(table[name].type)]).to_pandas()
    causes = pd.concat([_damaged(flat), _copies(flat)]).sort_index()
    unreadable = flat.index.isin(causes.index)
    cells = [json.loads(text) for text in flat.loc[~unreadable, "cell"]]
    accounts = _parsed(flat.loc[~unreadable, "account"])
    runs = flat[~unreadable].drop(columns=["account", "cell"]).rename(columns={"hash": "cell"})
    runs = runs.reset_index(drop=True).assign(stored=np.flatnonzero(~unreadable), settings=cells)
    runs = _identified(runs, cells, accounts).assign(predicted_wall_s=runs["run"].map(predicted).astype(float))
    return runs, flat.loc[unreadable, ["run"]].assign(cause=causes).reset_index(drop=True)


def _damaged(flat: pd.DataFrame) -> pd.Series:
    """Return what is wrong with each damaged run, by its position."""
    return "damaged: " + flat.loc[flat["state"] == DAMAGED, "cause"].astype(str)


def _copies(flat: pd.DataFrame) -> pd.Series:
    """Return which run each copied folder is a copy of, by its position: the run that has the name of its cell."""
    readable = flat[flat["state"] != DAMAGED]
    is_named = [run.endswith(f"-{code}") for run, code in zip(readable["run"], readable["hash"], strict=True)]
    lengths = readable["run"].str.len()
    ordered = readable.assign(foreign=np.logical_not(is_named), length=lengths).sort_values(["foreign", "length"])
    originals = ordered.groupby(["hash", "cell"], sort=False)["run"].transform("first")
    return "a copy of " + originals[originals != ordered["run"]]


def _parsed(texts: pd.Series) -> list[dict[str, Any]]:
    """Return the JSON objects in these texts; equal texts, as of runs that differ in their seeds, share one."""
    codes, distinct = pd.factorize(texts)
    objects = [json.loads(text) for text in distinct]
    return [objects[code] for code in codes]


def positions(runs: pd.DataFrame, stored: int) -> np.ndarray:
    """Return, for every row of the store, the position of its run in `runs`; -1 for the others."""
    position = np.full(stored, -1)
    position[runs["stored"]] = np.arange(len(runs))
    return position


def _identified(runs: pd.DataFrame, cells: list[dict[str, Any]], accounts: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the runs with what their cells and accounts state."""
    models, train = [cell["model"] for cell in cells], [cell.get("train") or {} for cell in cells]
    smaller = np.array([any(cell.get(name) is not None for name in AFTER_TRAINING) for cell in cells], bool)
    half_keys = pd.array([model.get("half_keys") for model in models], "Float64").to_numpy(float, na_value=np.nan)
    stated = {
        "family": [model["family"] for model in models],
        "base": [model["base"] for model in models],
        "seed": [cell["seed"] for cell in cells],
        "half_keys": half_keys,
        "memory_rows": _memory_rows(half_keys, accounts),
        "ffn_hidden": pd.to_numeric(pd.Series([model.get("ffn_hidden") for model in models], dtype=object)),
        "reshaped": np.array([is_reshaped(model) for model in models], bool) | smaller,
        "smaller": smaller,
        "control": [model.get("control") for model in models],
        "pairing": [pairing(cell) for cell in cells],
        "train_key": [training(cell) for cell in cells],
        "steady": np.array([settings.get("schedule", "constant") == "constant" for settings in train], bool) & ~smaller,
        "stops_early": np.array([bool(settings.get("stop_past")) for settings in train], bool),
        "train": train,
        "model": models,
        "people": [cell["data"].get("people") if cell["data"].get("kind") == "bios" else None for cell in cells],
    }
    counted = {
        name: pd.to_numeric(pd.Series([account.get(field) for account in accounts], dtype=object))
        for name, field in ACCOUNT.items()
    }
    return runs.assign(**stated, **counted)


def _memory_rows(half_keys: NDArray[np.float64], accounts: list[dict[str, Any]]) -> Any:
    """Return the rows of each run's largest table; accounts of older runs do not state them."""
    counted = pd.array([account.get("memory_rows") for account in accounts], "Float64").to_numpy(float, na_value=np.nan)
    return np.where(np.isnan(counted), np.nan_to_num(half_keys) ** 2, counted)


def ordered(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Sort runs in reading order: bases from small to large, the reference family first, then families without a
    table."""
    size = runs.groupby("base")["params_active"].transform("min")
    tables = runs.groupby("family")["memory_rows"].transform("max") > 0
    keys = ["size", "base", "rank", "family", "ffn_hidden", "memory_rows", "label", "seed"]
    rank = np.where(runs["family"] == reference, 0, np.where(tables, 2, 1))
    ordered = runs.assign(rank=rank, size=size).sort_values(keys, na_position="first", kind="stable")
    return ordered.drop(columns=["rank", "size"]).reset_index(drop=True)


def with_partners(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the runs with their partner, a run of the reference family in its base shape, and the ratios to it.

    A partner shares base and data, and the training settings where one does. N of a cell is the partner's non-embedding
    parameters.
    """
    plain = runs[(runs["family"] == reference) & ~runs["reshaped"] & runs["params_total"].notna()]
    plain = plain.sort_values("stored")
    same_training = _first(plain, ["pairing", "train_key"], runs)
    same_data = _first(plain, ["pairing"], runs)
    partner = np.where(same_training >= 0, same_training, same_data)
    paired, at = partner >= 0, np.where(partner >= 0, partner, 0)
    columns: dict[str, Any] = {"partner": partner}
    for name, key in RATIOS.items():
        ours, theirs = runs[key].to_numpy(float), runs[key].to_numpy(float)[at]
        valid = paired & (np.nan_to_num(ours) != 0) & (np.nan_to_num(theirs) != 0)
        columns[name] = np.divide(ours, theirs, out=np.full(len(runs), np.nan), where=valid)
    size = (runs["params_total"] - runs["params_embedding"].fillna(0)).to_numpy(float)
    return runs.assign(**columns, N=np.where(paired, size[at], np.nan))


def _first(plain: pd.DataFrame, keys: list[str], runs: pd.DataFrame) -> np.ndarray:
    """Return, for every run, the position of the first plain run with the same keys; -1 without one."""
    first = plain.drop_duplicates(keys).assign(position=lambda table: table.index)[[*keys, "position"]]
    return runs[keys].merge(first, on=keys, how="left")["position"].fillna(-1).to_numpy(int)
