"""The probes of runs: a row per evaluation during training, the curves through them, and E50."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.records.run_files import AVERAGED
from analysis.records.runs.curves import Curves
from analysis.records.store import unnest

PROBE_COLUMNS = ("bits", "bits_max", "nll", "recall", "n")
TO_E50 = {"wall_to_e50": "wall_s", "flops_to_e50": "train_flops"}
"""Column of a run -> column of its probes whose value at E50 it holds."""


def probe_table(table: pa.Table, position: np.ndarray, averaged: bool) -> pd.DataFrame:
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


def curves_of(probes: pd.DataFrame, runs: int, y: str, x: str = "epoch") -> Curves:
    """Return the curves of one column of the probes over another; empty where no run has it.

    Args:
        probes: The probes of all runs.
        runs: Number of runs.
        y: A column.
        x: The column it is a function of.
    """
    if y not in probes or x not in probes:
        empty = np.array([])
        return Curves(empty.astype(int), empty, empty, runs)
    table = probes.dropna(subset=[x, y])
    return Curves(table["run"].to_numpy(int), table[x].to_numpy(float), table[y].to_numpy(float), runs)


def with_e50(runs: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with E50, what it cost, and N H of the people that the storage probes cover."""
    bits_max = curves_of(probes, len(runs), "storage_bits_max").last_y()
    e50, state = curves_of(probes, len(runs), "storage_bits").crossing(bits_max / 2)
    unsteady = ~runs["steady"].to_numpy(bool)
    e50[unsteady], state[unsteady] = np.nan, "none"
    reached = np.where(state == "reached", e50, np.nan)
    costs = {name: curves_of(probes, len(runs), key).at(reached, log=False) for name, key in TO_E50.items()}
    return runs.assign(e50=e50, e50_state=state, bits_max=bits_max, **costs)
