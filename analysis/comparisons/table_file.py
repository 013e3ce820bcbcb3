"""The `compare` verb: families of any table of runs against a reference, paired over seeds and by compute multiplier.

The run is the unit. Pairs share cell and seed. One contrast may be declared primary; the p-values of all others are
adjusted by Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparisons.multiplier import multipliers
from analysis.comparisons.statistics import MIN_PAIRS, holm, paired
from analysis.errors import InputError
from analysis.fits.budgets import budgets
from analysis.fits.columns import chosen, evaluate, expressions, labels, number
from analysis.records.grid_data import EQUAL

NEEDED = {"family": "names of families", "y": "loss or error, lower is better"}
OPTIONAL = {
    "C": "training FLOPs, for the compute multiplier",
    "cell": "what pairs share, as the base size; default: C",
    "seed": "pairs runs",
    "params": "its ratio is stated",
    "bytes": "its ratio is stated",
}


def columns_of(table: pd.DataFrame, columns: str, where: str | None) -> pd.DataFrame:
    """Return the columns that a comparison needs, from expressions.

    Args:
        table: Runs as read from a file.
        columns: NAME=EXPRESSION,... with the names of NEEDED and OPTIONAL.
        where: A condition that rows have to satisfy.

    Returns:
        family, cell and seed as labels, the rest as positive numbers.

    Raises:
        InputError: An unknown or missing column, or values that are missing or not positive.
    """
    requested, rows = expressions(columns), chosen(table, where, "--where")
    unknown = [name for name in requested if name not in NEEDED | OPTIONAL]
    missing = [name for name in NEEDED if name not in requested]
    if unknown or missing:
        problem = f"got {unknown[0]!r}" if unknown else f"{missing[0]} is missing ({NEEDED[missing[0]]})"
        raise InputError(f"--columns: {problem}; allowed: {', '.join(NEEDED)}, and optionally {', '.join(OPTIONAL)}")
    if not {"C", "seed"} & requested.keys():
        raise InputError("--columns: C (for the compute multiplier) or seed (for paired differences) is needed")
    if not {"C", "cell"} & requested.keys():
        raise InputError("--columns: cell is missing: what pairs share, such as the base size")
    values: dict[str, Any] = {}
    for name, expression in requested.items():
        series = evaluate(rows, expression, f"--columns: {name}")
        if series.isna().any():
            raise InputError(f"--columns: {name} is missing in {int(series.isna().sum())} of {len(series)} rows")
        if name in ("family", "cell", "seed"):
            values[name] = labels(series).to_numpy()
            continue
        values[name] = number(rows, expression, f"--columns: {name}")
        if not (np.isfinite(values[name]) & (values[name] > 0)).all():
            raise InputError(f"--columns: {name} must be finite and above 0 in every row")
    if "cell" not in values:
        values["cell"] = [f"{budget:.3g}" for budget in budgets(values["C"])]
    return pd.DataFrame(values)


def compare(
    runs: pd.DataFrame, reference: str, primary: str | None, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compute paired differences and compute multipliers of every family against the reference.

    Args:
        runs: The columns of `columns_of`.
        reference: Family that the others are compared with.
        primary: FAMILY:CELL of the one contrast whose p-value is not adjusted.
        draws: Bootstrap draws of the multipliers.
        seed: Of the draws.

    Raises:
        InputError: No runs of the reference, none of another family, an unknown primary contrast, or two runs
            of a family that share cell and seed.
    """
    families = list(dict.fromkeys(runs["family"]))
    if reference not in families:
        raise InputError(f"--reference: got {reference!r}, allowed: {', '.join(families)}")
    others = [name for name in families if name != reference]
    if not others:
        raise InputError(f"--columns: family is {reference!r} in every row, so there is nothing to compare")
    of_reference = runs[runs["family"] == reference]
    differences, pooled = [], []
    if "seed" in runs:
        for (family, cell), part in runs[runs["family"] != reference].groupby(["family", "cell"], sort=False):
            differences += _difference(part, of_reference[of_reference["cell"] == cell], str(family), str(cell))
        pooled = [item for name in others for item in _pooled(runs[runs["family"] == name], of_reference, name)]
    _tested(differences, primary)
    compared = {"reference": reference, "differences": differences, "pooled": pooled}
    return compared | _multipliers(runs, of_reference, others, draws, seed)


def _tested(differences: list[dict[str, Any]], primary: str | None) -> None:
    """Mark the primary contrast, FAMILY:CELL, and adjust all others."""
    named = {f"{item['family']}:{item['cell']}": item for item in differences}
    if primary is not None:
        if primary not in named:
            raise InputError(f"--primary: got {primary!r}, allowed: {', '.join(named) or 'none, there are no pairs'}")
        named[primary]["primary"] = True
    rest = [item for item in differences if not item["primary"]]
    for item, p in zip(rest, holm([item["p"] for item in rest]), strict=True):
        item["p_holm"] = p


def _difference(ours: pd.DataFrame, theirs: pd.DataFrame, family: str, cell: str) -> list[dict[str, Any]]:
    """Return a family against the reference at one cell; empty where no seed is shared."""
    for part in (ours, theirs):
        if (twice := part["seed"].duplicated()).any():
            name, seed = part["family"].iloc[0], part.loc[twice, "seed"].iloc[0]
            raise InputError(f"--columns: got two runs of {name} at cell {cell} and seed {seed}, allowed: one")
    joined = ours.merge(theirs, on="seed", suffixes=("", "_ref"))
    if joined.empty:
        return []
    difference = paired((joined["y"] - joined["y_ref"]).to_numpy())
    ratios = {
        name: float((joined[name] / joined[f"{name}_ref"]).mean()) for name in ("C", "params", "bytes") if name in ours
    }
    equal = abs(ratios["C"] - 1) <= EQUAL if "C" in ratios else None
    return [
        {
            "family": family,
            "cell": cell,
            "primary": False,
            "pairs": difference.n,
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
            "ratios": ratios,
            "equal_flop": equal,
        }
    ]


def _pooled(ours: pd.DataFrame, theirs: pd.DataFrame, family: str) -> list[dict[str, Any]]:
    """Return the mean difference over cells; empty with fewer than two cells.

    Cells count equally. The t-interval is for these cells: differences vary within a cell by one variance, which is
    pooled over cells, around a mean of the cell's own. (Our choice.)
    """
    from scipy.special import stdtrit

    joined = ours.merge(theirs, on=["cell", "seed"], suffixes=("", "_ref"))
    differences = (joined["y"] - joined["y_ref"]).groupby(joined["cell"])
    means, counts = differences.mean(), differences.count()
    if len(means) < 2:
        return []
    free, mean = int((counts - 1).sum()), float(means.mean())
    reach = float("nan")
    if len(joined) >= MIN_PAIRS and free > 0:
        variance = float((differences.var(ddof=0) * counts).sum()) / free
        reach = float(stdtrit(free, 0.975)) * float(np.sqrt(variance * (1 / counts).sum())) / len(means)
    ends = {"low": mean - reach, "high": mean + reach, "smallest": float(means.min()), "largest": float(means.max())}
    return [{"family": family, "cells": len(means), "pairs": len(joined), "difference": mean} | ends]


def _multipliers(
    runs: pd.DataFrame, reference: pd.DataFrame, others: list[str], draws: int, seed: int
) -> dict[str, Any]:
    """Return the multipliers by family and cell, or the reason why the reference does not allow them."""
    if "C" not in runs:
        return {"multipliers": [], "reason": "no column C"}
    try:
        items = [
            {"family": name} | asdict(item)
            for name in others
            for item in multipliers(reference, runs[runs["family"] == name], draws, seed)
        ]
    except InputError as error:
        return {"multipliers": [], "reason": str(error)}
    for item in items:
        if item["runs"] < MIN_PAIRS:
            item["low"] = item["high"] = float("nan")
    return {"multipliers": items, "reason": None}


def text(result: Mapping[str, Any]) -> str:
    """Return a comparison as lines for a terminal."""
    lines = []
    for item in result["differences"]:
        p = "" if np.isnan(item["p"]) else f", p {item['p']:.3g} (primary)"
        if p and not item["primary"]:
            p = f", p {item['p_holm']:.3g} (Holm)"
        ratios = ", ".join(f"{value:.3g}x {name}" for name, value in item["ratios"].items())
        flops = {None: "", True: ", equal-FLOP", False: ", not equal-FLOP"}[item["equal_flop"]]
        value = f"{item['difference']:+.5g}{_ends(item)}, {item['pairs']} pairs{p}"
        lines.append(
            f"{item['family']} - {result['reference']} at {item['cell']}: {value}; {ratios}{flops}".rstrip("; ")
        )
    lines += [
        f"{item['family']} - {result['reference']} over {item['cells']} cells: {item['difference']:+.5g}{_ends(item)}, "
        f"{item['pairs']} pairs; by cell {item['smallest']:+.4g} to {item['largest']:+.4g}"
        for item in result["pooled"]
    ]
    for item in result["multipliers"]:
        note = ", extrapolated" if item["extrapolated"] else ""
        value = f"{item['value']:.4g}{_ends(item)}, {item['runs']} runs{note}"
        value = f"refused: {item['reason']}" if item["reason"] else value
        lines.append(f"compute multiplier of {item['family']} at {item['cell']}: {value}")
    if result["multipliers"]:
        misfit = result["multipliers"][0]["misfit"]
        lines.append(f"the {result['reference']} curve misses its own cells by {misfit:.2g} (root mean square)")
    if result["reason"]:
        lines.append(f"no compute multiplier: {result['reason']}")
    lines.append(f"95 % intervals for {MIN_PAIRS}+ pairs or runs")
    return "\n".join(lines)


def _ends(item: Mapping[str, Any]) -> str:
    return "" if np.isnan(item["low"]) else f" [{item['low']:.4g}, {item['high']:.4g}]"
