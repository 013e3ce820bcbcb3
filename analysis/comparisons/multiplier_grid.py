"""The compute multiplier of a grid's variants: final loss against training FLOPs along its plain reference runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd

from analysis.comparisons.multiplier import Multiplier, multipliers
from analysis.comparisons.statistics import MIN_PAIRS
from analysis.errors import InputError
from analysis.records.grid_data import GridData

Named = tuple[str, str, Multiplier]


def multipliers_along_reference(data: GridData) -> tuple[list[Named], list[str]]:
    """Return the multiplier of each variant, by data.

    Returns:
        (base, variant, multiplier), without intervals below MIN_PAIRS runs; and the reasons why some have none.
    """
    table = data.done[data.done["eval_loss"].gt(0) & data.done["train_flops"].gt(0)]
    if table.empty:
        return [], ["no finished run has a final loss"]
    if table["stops_early"].any():
        return [], ["runs stop at a share of what there is to learn, so their final loss does not belong to a budget"]
    budget = table["tokens"].map("{:.3g} tokens".format)
    table = table.assign(
        cell=table["base"] + " " + table["label"] + " " + budget,
        shared=table["base"] + " " + budget,
        C=table["train_flops"],
        y=table["eval_loss"],
    )
    results: list[Named] = []
    reasons: list[str] = []
    for _, part in table.groupby(table["pairing"].map(_data), sort=False):
        plain = part["family"].eq(data.reference) & ~part["reshaped"]
        try:
            results += [_named(part, item) for item in multipliers(part[plain], part[~plain])]
        except InputError as error:
            reasons.append(str(error))
    return results, list(dict.fromkeys(reasons))


def _named(part: pd.DataFrame, item: Multiplier) -> Named:
    first = part[part["cell"] == item.cell].iloc[0]
    few = item.runs < MIN_PAIRS
    shown = replace(item, low=float("nan"), high=float("nan")) if few else item
    return str(first["base"]), str(first["label"]), shown


def _data(pairing: str) -> str:
    """Return the data of a pairing, without the base."""
    return json.dumps(json.loads(pairing)[1])
