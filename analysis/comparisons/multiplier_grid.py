"""The compute multiplier of a grid's variants: final loss against training FLOPs along its plain dense runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd

from analysis.comparisons.multiplier import Multiplier, multipliers
from analysis.comparisons.paired import MIN_PAIRS
from analysis.errors import InputError
from analysis.figures.scene import ordered
from analysis.records.runs import Run, summary


def multipliers_along_dense(runs: list[Run]) -> tuple[list[tuple[str, str, Multiplier]], list[str]]:
    """(base, variant, multiplier) of each variant, by data, without intervals below MIN_PAIRS runs; and why some
    have none."""
    table = ordered(summary(runs))
    table = table[(table["state"] == "done") & table["eval_loss"].gt(0) & table["train_flops"].gt(0)]
    if table.empty:
        return [], ["no finished run has a final loss"]
    cells = {run.name: run.cell for run in runs}
    if any(cells[name].get("train", {}).get("stop_past") for name in table["run"]):
        return [], ["runs stop by what they have learned, so their final loss does not answer to a budget"]
    table = table.assign(cell=table["base"] + " " + table["label"], C=table["train_flops"], y=table["eval_loss"])
    found: list[tuple[str, str, Multiplier]] = []
    reasons: list[str] = []
    for _, part in table.groupby(table["pairing"].map(_data), sort=False):
        plain = part["family"].eq("dense") & ~part["reshaped"]
        try:
            found += [_named(part, item) for item in multipliers(part[plain], part[~plain])]
        except InputError as error:
            reasons.append(str(error))
    return found, list(dict.fromkeys(reasons))


def _named(part: pd.DataFrame, item: Multiplier) -> tuple[str, str, Multiplier]:
    first = part[part["cell"] == item.cell].iloc[0]
    known = item if item.runs >= MIN_PAIRS else replace(item, low=float("nan"), high=float("nan"))
    return str(first["base"]), str(first["label"]), known


def _data(pairing: str) -> str:
    """The data of a pairing, whatever the base."""
    return json.dumps(json.loads(pairing)[1])
