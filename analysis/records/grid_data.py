"""The runs of a grid (or of a results folder) as one set of tables, built once for a command.

Every figure, comparison, fit and report reads GridData. `runs` has a row per run in reading order; the longer tables
name a run by its position in `runs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.records import store
from analysis.records.curves import Curves
from analysis.records.grids import Contrast, read_grid, read_grids, read_plans, read_source
from analysis.records.labels import AFTER_TRAINING, is_reshaped, labels, pairing, trained_labels, training
from analysis.records.run_files import AVERAGED, DAMAGED
from analysis.records.scores import IDENTITY, final_scores, without_tables

EQUAL = 0.05
"""Largest deviation of a ratio from 1 that is still called equal."""
DONE = "done"
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
PROBE_COLUMNS = ("bits", "bits_max", "nll", "recall", "n")
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


@dataclass(frozen=True)
class GridData:
    """The records of a grid.

    runs: one row per readable run, in reading order: identity (run, cell, label, trained_label, family, base, seed,
        half_keys, memory_rows, ffn_hidden, reshaped, smaller, control, pairing, train_key), state and cause, the
        account, ratios to the partner, speed, how far it got, and E50. Runs with smaller tables (`smaller`) count as
        reshaped, are no partners, and have no E50. `e50` is an exposure; `e50_state` is reached, censored (`e50` is
        then the last exposure, a lower bound), early (an upper bound) or none (no storage probes at a constant learning
        rate).
        `partner` is the position of the reference run that ratios are relative to, -1 without one.
    probes: one row per probe: run, step, tokens, epoch, train_flops, wall_s, eval_loss and `<kind>_<metric>`.
    table_use: one row per logged step of a run with tables: run, tokens, used, never_read, kl_bits.
    hit_rates: one row per size of a cache of a run with tables: run, share, static, lru.
    smaller_tables: one row per run with quantised or dropped rows: run, source (the name of the trained run), form,
        kept_rows, bytes, source_bytes, loss, source_loss, and the paired standard error of the difference (stderr).
    scores: one row per final score, see analysis.records.scores.
    tables_off: one row per final score that a run also has with its tables switched off, as `off`.
    knowledge, retention: one row per measurement of learning and forgetting, see analysis.records.knowledge.
    imported: one row per score that an imported checkpoint in the same results has in common with the runs: its name,
        score and value.
    damaged: run and cause of the runs with a record file that cannot be read.
    absent: runs that the grid names and that have no directory.
    """

    runs: pd.DataFrame
    probes: pd.DataFrame
    table_use: pd.DataFrame
    scores: pd.DataFrame
    reference: str
    damaged: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "cause"]))
    grid: str = ""
    source: str = ""
    contrast: Contrast | None = None
    absent: Sequence[str] = ()
    published: pd.DataFrame | None = None
    tables_off: pd.DataFrame = field(default_factory=pd.DataFrame)
    knowledge: pd.DataFrame = field(default_factory=pd.DataFrame)
    retention: pd.DataFrame = field(default_factory=pd.DataFrame)
    hit_rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    smaller_tables: pd.DataFrame = field(default_factory=pd.DataFrame)
    imported: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["name", "score", "value"]))

    @cached_property
    def done(self) -> pd.DataFrame:
        """The finished runs; their index is the position in `runs`."""
        return self.runs[self.runs["state"] == DONE]

    @cached_property
    def bases(self) -> list[str]:
        """Base sizes of the finished runs, smallest first."""
        size = self.done.groupby("base")["params_active"].min()
        return [str(base) for base in size.sort_values().index]

    def curves(self, y: str, x: str = "epoch") -> Curves:
        """Return the curves of a probe column over another, of all runs; empty where no run has it."""
        if y not in self.probes or x not in self.probes:
            empty = np.array([])
            return Curves(empty.astype(int), empty, empty, len(self.runs))
        table = self.probes.dropna(subset=[x, y])
        return Curves(table["run"].to_numpy(int), table[x].to_numpy(float), table[y].to_numpy(float), len(self.runs))

    def common_exposure(self, positions: pd.Index) -> float:
        """Return the last exposure that all of these runs were probed at; NaN without probes."""
        last = self.curves("epoch").last_x()[positions.to_numpy(int)]
        return float(last.min()) if len(last) else float("nan")

    @cached_property
    def has_bits(self) -> bool:
        """Whether any finished run has storage probes at a constant learning rate."""
        return bool(self.done["e50_state"].ne("none").any())


def load(
    results: Path,
    grid: str | None = None,
    reference: str | None = None,
    published: pd.DataFrame | None = None,
    fallback: str | None = None,
) -> GridData:
    """Return the records of a results folder, or of one grid in it.

    Args:
        results: Folder of runs/, grids/ and plans/.
        grid: Name of a grid that has records; None: all runs.
        reference: Family that the others are compared with; None: that of the grid's declared contrast.
        published: Numbers from papers, to be drawn with the runs.
        fallback: The reference family of a grid that declares no contrast.

    Raises:
        InputError: An unknown grid, no run at all, or no reference family.
    """
    recorded = None if grid is None else read_grid(results, grid)
    table = read_store(results, grid, COLUMNS)
    contrast = recorded.contrast if recorded else None
    data = from_store(table, reference, contrast, read_plans(results), fallback)
    return replace(
        data,
        grid=grid or "",
        source=read_source(results, grid) if grid else "",
        absent=tuple(sorted(set(recorded.runs) - set(table["run"].to_pylist()))) if recorded else (),
        published=published,
        imported=_imported(results, data.scores),
    )


IMPORTED = "imported-"
"""Beginning of the names of imported checkpoints' runs."""


def _imported(results: Path, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of imported checkpoints that are also among `scores`."""
    names = [name for name in store.scan(results) if name.startswith(IMPORTED)]
    table = store.load(results, ["scores"], names)
    recorded = unnest(table, "scores", np.arange(len(table)))
    recorded = recorded[recorded["split"] == "final"]
    named = recorded.assign(name=table["run"].to_pandas().to_numpy()[recorded["run"]]).drop(columns="run")
    same = scores.drop_duplicates("score")[[*IDENTITY, "score"]]
    return named.merge(same, on=[*IDENTITY])[["name", "score", "value"]]


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
        raise InputError(f"{results / 'runs'}: no runs here; make some: suite sweep {grid or 'smoke'}")
    return table


def from_store(
    table: pa.Table,
    reference: str | None,
    contrast: Contrast | None,
    predicted: Mapping[str, float],
    fallback: str | None = None,
) -> GridData:
    """Return the tables of the runs of a store.

    Args:
        table: The run table with COLUMNS.
        reference: Family that the others are compared with; None: that of the contrast.
        contrast: The grid's declared contrast, if any.
        predicted: The planned training time in seconds, by run.
        fallback: The reference family without a contrast.

    Raises:
        InputError: No reference family.
    """
    runs, damaged = run_table(table, predicted)
    reference = _reference(runs, reference, contrast) or fallback
    if reference is None:
        raise InputError("--reference: missing, and the grid declares no contrast; name the family to compare with")
    cells = list(runs["settings"])
    runs = runs.assign(label=labels(cells), trained_label=trained_labels(cells))
    runs = with_partners(_ordered(runs, reference), reference)
    position = positions(runs, len(table))
    averaged = contrast is not None and contrast.averaged
    probes, table_use = _probes(table, position, averaged), unnest(table, "table_use", position)
    data = GridData(runs, probes, table_use, pd.DataFrame(), reference, damaged)
    runs = _with_e50(data)
    recorded = unnest(table, "scores", position)
    scores = final_scores(runs, recorded, unnest(table, "answers", position))
    return replace(
        data,
        runs=runs,
        scores=scores,
        contrast=contrast,
        tables_off=without_tables(scores, recorded),
        knowledge=unnest(table, "knowledge", position),
        retention=unnest(table, "retention", position),
        hit_rates=unnest(table, "hit_rates", position),
        smaller_tables=unnest(table, "smaller_tables", position),
    )


def run_table(table: pa.Table, predicted: Mapping[str, float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the readable runs of a store in its order, and run and cause of the damaged ones.

    `stored` is the row of a run in the store, `settings` its cell.
    """
    flat = table.select([name for name in table.column_names if not pa.types.is_list(table[name].type)]).to_pandas()
    unreadable = (flat["state"] == DAMAGED).to_numpy()
    cells = [json.loads(text) for text in flat.loc[~unreadable, "cell"]]
    accounts = _parsed(flat.loc[~unreadable, "account"])
    runs = flat[~unreadable].drop(columns=["account", "cell"]).rename(columns={"hash": "cell"})
    runs = runs.reset_index(drop=True).assign(stored=np.flatnonzero(~unreadable), settings=cells)
    runs = _identified(runs, cells, accounts).assign(predicted_wall_s=runs["run"].map(predicted).astype(float))
    return runs, flat.loc[unreadable, ["run", "cause"]].reset_index(drop=True)


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


def unnest(table: pa.Table, column: str, position: np.ndarray) -> pd.DataFrame:
    """Return a list column as a table of its entries, with the position of their run; -1 leaves a run's entries out.

    Args:
        table: The run table.
        column: A list column.
        position: The position of each run in the result's `run`; -1 omits a run.
    """
    lists = table[column].combine_chunks()
    entries = lists.flatten()
    run = position[np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy(zero_copy_only=False))]
    columns: dict[str, Any] = {"run": run}
    for at, leaf in enumerate(entries.type):
        values = entries.field(at)
        numeric = pa.types.is_floating(leaf.type)
        columns[leaf.name] = values.to_numpy(zero_copy_only=False) if numeric else values.to_numpy(False)
    frame = pd.DataFrame(columns)
    return frame[frame["run"] >= 0].sort_values("run", kind="stable", ignore_index=True)


def _reference(runs: pd.DataFrame, reference: str | None, contrast: Contrast | None) -> str | None:
    """Return the family that the others are compared with, as named or as declared."""
    if reference is not None:
        return reference
    declared = runs.loc[runs["run"].isin(contrast.reference), "family"] if contrast else runs["family"].iloc[:0]
    return str(declared.iloc[0]) if len(declared) else None


def _identified(runs: pd.DataFrame, cells: list[dict[str, Any]], accounts: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the runs with what their cells and accounts state."""
    models = [cell["model"] for cell in cells]
    smaller = [any(cell.get(name) is not None for name in AFTER_TRAINING) for cell in cells]
    half_keys = pd.array([model.get("half_keys") for model in models], "Float64").to_numpy(float, na_value=np.nan)
    stated = {
        "family": [model["family"] for model in models],
        "base": [model["base"] for model in models],
        "seed": [cell["seed"] for cell in cells],
        "half_keys": half_keys,
        "memory_rows": _memory_rows(half_keys, accounts),
        "ffn_hidden": pd.to_numeric(pd.Series([model.get("ffn_hidden") for model in models], dtype=object)),
        "reshaped": [is_reshaped(model) or is_smaller for model, is_smaller in zip(models, smaller, strict=True)],
        "smaller": smaller,
        "control": [model.get("control") for model in models],
        "pairing": [pairing(cell) for cell in cells],
        "train_key": [training(cell) for cell in cells],
        "steady": [
            (cell.get("train") or {}).get("schedule", "constant") == "constant" and not is_smaller
            for cell, is_smaller in zip(cells, smaller, strict=True)
        ],
        "stops_early": [bool((cell.get("train") or {}).get("stop_past")) for cell in cells],
        "train": [cell.get("train") or {} for cell in cells],
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


def _ordered(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
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


def _probes(table: pa.Table, position: np.ndarray, averaged: bool) -> pd.DataFrame:
    """Return one row per line of train.jsonl with an evaluation-mode loss or a probe.

    If `averaged`, the values of the average of the weights take the place of those of the weights.
    """
    lines = unnest(table, "lines", position)
    lines["line"] = lines.groupby("run").cumcount()
    scores = unnest(table, "probes", position)
    wide = lines.set_index(["run", "line"])
    scored = pd.MultiIndex.from_frame(scores[["run", "line"]].astype({"line": int}))
    wide = wide[wide["eval_loss"].notna() | wide.index.isin(scored)].drop(columns=["loss", "tokens_per_s"])
    for kind, part in scores.groupby("kind", sort=False):
        part = part.astype({"line": int}).set_index(["run", "line"])[list(PROBE_COLUMNS)]
        wide = wide.join(part.add_prefix(f"{kind}_"))
    if averaged:
        of_average = [str(name) for name in wide if str(name).startswith(AVERAGED)]
        wide = wide.drop(columns=[name.removeprefix(AVERAGED) for name in of_average])
        wide = wide.rename(columns={name: name.removeprefix(AVERAGED) for name in of_average})
    return wide.reset_index().drop(columns="line")


def _with_e50(data: GridData) -> pd.DataFrame:
    """Return the runs with E50, what it cost, and N H of the people that the storage probes cover."""
    bits, runs = data.curves("storage_bits"), data.runs
    bits_max = data.curves("storage_bits_max").last_y()
    e50, state = bits.crossing(bits_max / 2)
    unsteady = ~runs["steady"].to_numpy(bool)
    e50[unsteady], state[unsteady] = np.nan, "none"
    reached = np.where(state == "reached", e50, np.nan)
    costs = {name: data.curves(key).at(reached, log=False) for name, key in TO_E50.items()}
    return runs.assign(e50=e50, e50_state=state, bits_max=bits_max, **costs)


TO_E50 = {"wall_to_e50": "wall_s", "flops_to_e50": "train_flops"}


def grids_of(results: Path, grid: str | None) -> list[str]:
    """Return the grid that was named, or all that have records.

    Raises:
        InputError: None has.
    """
    if grid is not None:
        return [grid]
    names = list(read_grids(results))
    if not names:
        raise InputError(f"{results / 'grids'}: no grids here; make one: suite sweep smoke")
    return names
