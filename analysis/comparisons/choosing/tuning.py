"""The best setting of each variant in a tuning grid, whether it is interior, and how much it matters.

A variant is what a report calls so, without the tuned fields: a family, and what varies within it, such as its form or
table size. All variants need the same number of runs; otherwise their best settings are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.records.grid_data import GridData
from analysis.records.runs.labels import labels

AXES = ("lr", "value_lr", "value_weight_decay")
GROUP = ["variant", "base"]
"""Columns of the runs that one choice is made among."""


@dataclass(frozen=True)
class Choice:
    """The best setting of one variant at one base size, by its mean share of N H stored at the last probe.

    `edges` names the axes whose best value is the first or last tried (of three or more). `worst_neighbour` is the
    lowest share among settings one step away on one axis; it shows how much the setting matters.
    """

    family: str
    variant: str
    base: str
    runs: int
    setting: dict[str, float]
    share: float
    edges: tuple[str, ...]
    worst_neighbour: float


def table(data: GridData) -> pd.DataFrame:
    """Return one row per finished run: family, variant, base, seed, the tuned fields that it has, and the share of bits
    stored.

    Raises:
        InputError: No run is done with storage probes.
    """
    runs = data.done.assign(share=data.stored_share)
    runs = runs[runs["share"].notna()].sort_values("stored")
    if runs.empty:
        raise InputError("no run of this grid is done with storage probes; run it first")
    has_table = runs["params_memory"].fillna(0) > 0
    for axis in AXES:
        values = [train.get(axis) for train in runs["train"]]
        tuned = has_table | (axis == "lr")
        runs[axis] = np.where(tuned, pd.to_numeric(pd.Series(values, index=runs.index, dtype=object)), np.nan)
    runs["variant"] = labels(list(runs["settings"]), [f"train.{axis}" for axis in AXES])
    return runs[["family", *GROUP, "seed", *AXES, "share"]].reset_index(drop=True)


def choices(scored: pd.DataFrame) -> list[Choice]:
    """Return the choice of every variant of a tuning table, in the grid's order."""
    return [_choice(part) for _, part in scored.groupby(GROUP, sort=False)]


def _choice(scored: pd.DataFrame) -> Choice:
    axes = [axis for axis in AXES if scored[axis].notna().any()]
    means = scored.groupby(axes)["share"].mean().reset_index()
    best = means.sort_values("share").iloc[-1]
    tried = {axis: sorted(means[axis].unique()) for axis in axes}
    place = {axis: tried[axis].index(best[axis]) for axis in axes}
    edges = tuple(axis for axis in axes if len(tried[axis]) > 2 and place[axis] in (0, len(tried[axis]) - 1))
    neighbours = []
    for axis in axes:
        others = [other for other in axes if other != axis]
        near = [tried[axis][i] for i in (place[axis] - 1, place[axis] + 1) if 0 <= i < len(tried[axis])]
        same = (means[others] == best[others]).all(axis=1) if others else pd.Series(True, index=means.index)
        neighbours += means.loc[means[axis].isin(near) & same, "share"].tolist()
    return Choice(
        family=str(scored["family"].iloc[0]),
        variant=str(scored["variant"].iloc[0]),
        base=str(scored["base"].iloc[0]),
        runs=len(scored),
        setting={axis: float(best[axis]) for axis in axes},
        share=float(best["share"]),
        edges=edges,
        worst_neighbour=min(neighbours, default=float("nan")),
    )


def markdown(scored: pd.DataFrame) -> str:
    """Return the choices as a table, followed by every setting tried."""
    lines = [
        "| variant | base | runs | lr | value lr | value weight decay | stored | worst neighbour "
        "| at an edge (of three or more) |",
        "|---" * 9 + "|",
    ]
    for choice in choices(scored):
        setting = [f"{choice.setting[axis]:g}" if axis in choice.setting else "" for axis in AXES]
        cells = [choice.variant, choice.base, str(choice.runs), *setting, f"{choice.share:.1%}"]
        cells += [f"{choice.worst_neighbour:.1%}", ", ".join(choice.edges) or "no"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| variant | base | lr | value lr | value weight decay | seeds | stored |", "|---" * 7 + "|"]
    grouped = scored.groupby([*GROUP, *AXES], dropna=False)["share"].agg(["count", "mean"])
    for _, row in grouped.reset_index().iterrows():
        shown = ["" if pd.isna(row[axis]) else f"{row[axis]:g}" for axis in AXES]
        cells = [row["variant"], row["base"], *shown, f"{row['count']:.0f}", f"{row['mean']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
