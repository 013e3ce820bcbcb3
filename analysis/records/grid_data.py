"""The runs of a grid (or of a results folder) as one set of tables, built once for a command.

Every figure, comparison, fit and report reads GridData. `runs` has a row per run in reading order; the longer tables
name a run by its position in `runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.errors import InputError
from analysis.records import store
from analysis.records.grids import Contrast, read_baselines, read_grid, read_grids, read_plans, read_source
from analysis.records.runs.curves import Curves
from analysis.records.runs.labels import labels, trained_labels
from analysis.records.runs.probes import curves_of, probe_table, with_e50
from analysis.records.runs.table import COLUMNS, ordered, positions, read_store, run_table, with_partners
from analysis.records.scores import IDENTITY, final_scores, without_tables
from analysis.records.store import unnest

EQUAL = 0.05
"""Largest deviation of a ratio from 1 that is still called equal."""
DONE = "done"


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
    left_out: run and cause of the runs with a record file that cannot be read, and of copies.
    absent: runs that the grid names and that have no directory.
    """

    runs: pd.DataFrame
    probes: pd.DataFrame
    table_use: pd.DataFrame
    scores: pd.DataFrame
    reference: str
    left_out: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "cause"]))
    grid: str = ""
    source: str = ""
    baselines: str = ""
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
        return curves_of(self.probes, len(self.runs), y, x)

    @cached_property
    def stored_share(self) -> pd.Series:
        """The share of the bits of its world that each run had stored at its last probe; NaN without storage probes."""
        return self.curves("storage_bits").last_y() / self.runs["bits_max"]

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
        baselines=read_baselines(results, grid) if grid else "",
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
    runs, left_out = run_table(table, predicted)
    reference = _reference(runs, reference, contrast) or fallback
    if reference is None:
        raise InputError("--reference: missing, and the grid declares no contrast; name the family to compare with")
    cells = list(runs["settings"])
    runs = runs.assign(label=labels(cells), trained_label=trained_labels(cells))
    runs = with_partners(ordered(runs, reference), reference)
    position = positions(runs, len(table))
    averaged = contrast is not None and contrast.averaged
    probes = probe_table(table, position, averaged)
    runs = with_e50(runs, probes)
    recorded = unnest(table, "scores", position)
    scores = final_scores(runs, recorded, unnest(table, "answers", position))
    return GridData(
        runs,
        probes,
        unnest(table, "table_use", position),
        scores,
        reference,
        left_out,
        contrast=contrast,
        tables_off=without_tables(scores, recorded),
        knowledge=unnest(table, "knowledge", position),
        retention=unnest(table, "retention", position),
        hit_rates=unnest(table, "hit_rates", position),
        smaller_tables=unnest(table, "smaller_tables", position),
    )


def _reference(runs: pd.DataFrame, reference: str | None, contrast: Contrast | None) -> str | None:
    """Return the family that the others are compared with, as named or as declared."""
    if reference is not None:
        return reference
    declared = runs.loc[runs["run"].isin(contrast.reference), "family"] if contrast else runs["family"].iloc[:0]
    return str(declared.iloc[0]) if len(declared) else None


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
