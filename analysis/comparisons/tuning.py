"""What a tuning grid chose: the best setting of each family, whether it lies inside its axes, how much it matters.

Every family must have had the same number of runs, or its best is not comparable with the others'.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.errors import InputError
from analysis.records.runs import Run

AXES = ("lr", "value_lr", "value_weight_decay")


@dataclass(frozen=True)
class Choice:
    """The best setting of one family, by its mean share of N H stored at the last probe.

    `edges` names the axes whose best value is the first or last tried (of three or more); `worst_neighbour` is
    the lowest share among settings one step away on one axis: how much the choice matters.
    """

    family: str
    runs: int
    setting: dict[str, float]
    share: float
    edges: tuple[str, ...]
    worst_neighbour: float


def table(runs: list[Run]) -> pd.DataFrame:
    """One row per run that is done: family, the tuned fields (absent ones NaN) and the share of bits stored."""
    rows = []
    for run in runs:
        if run.state.get("state") != "done" or "storage_bits" not in run.probes:
            continue
        train = run.cell["train"]
        share = float(run.probes["storage_bits"].iloc[-1]) / run.bits_max
        setting = {axis: train.get(axis) for axis in AXES if run.account.get("params_memory") or axis == "lr"}
        rows.append({"family": run.model["family"], "seed": run.cell["seed"], **setting, "share": share})
    if not rows:
        raise InputError("no run of this grid is done with storage probes; run it first")
    return pd.DataFrame(rows).reindex(columns=["family", "seed", *AXES, "share"])


def choices(runs: list[Run]) -> list[Choice]:
    """The choice of every family, in the grid's order."""
    scored = table(runs)
    return [_choice(str(family), part) for family, part in scored.groupby("family", sort=False)]


def _choice(family: str, scored: pd.DataFrame) -> Choice:
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
        alike = (means[others] == best[others]).all(axis=1) if others else pd.Series(True, index=means.index)
        neighbours += means.loc[means[axis].isin(near) & alike, "share"].tolist()
    return Choice(
        family=family,
        runs=len(scored),
        setting={axis: float(best[axis]) for axis in axes},
        share=float(best["share"]),
        edges=edges,
        worst_neighbour=min(neighbours, default=float("nan")),
    )


def markdown(runs: list[Run]) -> str:
    """The choices as a table, and under it every setting tried."""
    lines = [
        "| family | runs | lr | value lr | value weight decay | stored | worst neighbour | at an edge |",
        "|---" * 8 + "|",
    ]
    for choice in choices(runs):
        setting = [f"{choice.setting[axis]:g}" if axis in choice.setting else "" for axis in AXES]
        cells = [choice.family, str(choice.runs), *setting, f"{choice.share:.1%}", f"{choice.worst_neighbour:.1%}"]
        lines.append("| " + " | ".join([*cells, ", ".join(choice.edges) or "no"]) + " |")
    lines += ["", "| family | lr | value lr | value weight decay | seeds | stored |", "|---" * 6 + "|"]
    grouped = table(runs).groupby(["family", *AXES], dropna=False)["share"].agg(["count", "mean"])
    for _, row in grouped.reset_index().iterrows():
        shown = ["" if pd.isna(row[axis]) else f"{row[axis]:g}" for axis in AXES]
        lines.append("| " + " | ".join([row["family"], *shown, f"{row['count']:.0f}", f"{row['mean']:.1%}"]) + " |")
    return "\n".join(lines) + "\n"
