"""The compute multiplier: training compute with which the reference reaches a family's outcome, over the family's own.

A power law with offset is fitted to runs of the reference, loss (or error, 1 - accuracy) against training FLOPs, and
solved for the compute at the outcome of each cell of the family. The curve is the envelope of the reference: the cells
that no other cell dominates by reaching as low a loss with as little compute. Cells off the envelope, whose model is
too large or too small for their budget, do not enter the fit. A cell of the family with the size and budget of such a
cell has no multiplier; the paired difference compares the two.

The unit is the run: whole runs are resampled within cells, on both sides, and everything is fitted again. An outcome
outside those of the curve's runs is extrapolated and marked as such. If the curve misses its own cells by more than the
family's distance from it, it cannot separate the two, and the multiplier is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.budgets import SAME_BUDGET, budgets
from analysis.fits.fit import Fit, fit
from analysis.fits.intervals import Bootstrap, bootstrap
from analysis.fits.problem import Problem
from analysis.laws.builtin import LAWS

BUDGETS = 4
"""Fewest compute budgets on the curve of the reference."""
EXACT = 1e-4
"""A misfit below this share of the outcome is that of the fit's numerics, not of the curve."""


@dataclass(frozen=True)
class Multiplier:
    """One cell of a family.

    Attributes:
        flops, outcome: Mean compute and outcome of the cell.
        value: FLOPs of the reference for the same outcome over those of the cell; infinite if the outcome is beyond the
            law's offset, NaN if it is refused for `reason`.
        low, high: The 95 % interval; NaN if no cell has several runs.
        misfit: Root mean square distance of the reference's cells from the curve, in units of the outcome.
    """

    cell: str
    flops: float
    outcome: float
    value: float
    low: float
    high: float
    runs: int
    extrapolated: bool
    misfit: float
    reason: str | None = None


def multipliers(reference: pd.DataFrame, family: pd.DataFrame, draws: int = 1000, seed: int = 0) -> list[Multiplier]:
    """Return the multipliers of a family's cells.

    Args:
        reference: Runs with columns cell, C (training FLOPs) and y (loss or error, above 0).
        family: The same. A column `shared` in both names the size and budget that cells of the two share; it is `cell`
            by default.
        draws: Bootstrap draws.
        seed: Of the fit and the draws.

    Raises:
        InputError: Fewer than four budgets on the reference's curve, values that a law cannot be fitted to, or a cell
            that spans more than one budget.
    """
    _check("reference", reference)
    curve = reference[envelope(reference)]
    on_curve = len(np.unique(budgets(curve["C"].to_numpy(float))))
    if on_curve < BUDGETS:
        raise InputError(
            f"compute multiplier: the reference's curve has {on_curve} of the {BUDGETS} compute budgets that it needs"
        )
    _check("family", family)
    _check_budgets(family)
    law = fit(Problem(LAWS["power"], {"x": curve["C"].to_numpy(float)}, curve["y"].to_numpy(float)), seed)
    misfit = _misfit(law, curve)
    repeats = curve.groupby("cell").size().min() > 1
    drawn = bootstrap(law, draws, seed, strata=curve["cell"].astype(str).to_numpy()) if repeats else None
    beyond = len(curve) - curve["cell"].nunique()
    best, worst = float(curve["y"].min()), float(curve["y"].max())
    off_curve = set(_shared(reference)) - set(_shared(curve))
    generator = np.random.default_rng(seed)
    results = []
    for cell, group in family.groupby("cell", sort=False):
        y, c = group["y"].to_numpy(float), float(group["C"].mean())
        outcome = float(y.mean())
        value, low, high = float(_inverse(law.parameters, outcome)) / c, math.nan, math.nan
        if drawn is not None and drawn.completed and len(y) > 1:
            means = generator.choice(y, (drawn.completed, len(y) - 1)).mean(1)
            low, high = (end / c for end in _interval(law, drawn, y, means, beyond))
        effect = abs(outcome - float(law.predict({"x": np.array([c])})[0]))
        reason = None
        if set(_shared(group)) & off_curve:
            reason = "the reference's own cell of this size and budget is not on the reference's curve"
        elif misfit > max(effect, EXACT * outcome):
            reason = f"the curve misses the reference's cells by {misfit:.2g}, and this one is {effect:.2g} from it"
        if reason:
            value = low = high = math.nan
        outside = not best <= outcome <= worst
        results.append(Multiplier(str(cell), c, outcome, value, low, high, len(y), outside, misfit, reason))
    return results


def envelope(runs: pd.DataFrame) -> np.ndarray:
    """Return which runs belong to cells that no other cell dominates with a mean outcome as low and as little compute.

    Runs of one cell at several budgets count as several cells.
    """
    budget = budgets(runs["C"].to_numpy(float))
    cells = runs.assign(budget=budget).groupby(["budget", "cell"])["y"].mean()
    best = cells.groupby(level="budget").min()
    on_curve = best[best < best.cummin().shift(fill_value=math.inf)]
    members = cells.reset_index().merge(on_curve.reset_index(), on=["budget", "y"])
    return pd.MultiIndex.from_arrays([budget, runs["cell"]]).isin(pd.MultiIndex.from_frame(members[["budget", "cell"]]))


def _shared(runs: pd.DataFrame) -> pd.Series:
    return runs["shared"] if "shared" in runs else runs["cell"]


def _check(name: str, runs: pd.DataFrame) -> None:
    values = runs[["C", "y"]].to_numpy(float)
    if not len(runs) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"compute multiplier: the {name}'s runs need finite C and y above 0")


def _check_budgets(runs: pd.DataFrame) -> None:
    for cell, group in runs.groupby("cell", sort=False):
        low, high = float(group["C"].min()), float(group["C"].max())
        if high > low * SAME_BUDGET:
            raise InputError(
                f"compute multiplier: cell {cell} spans {low:.3g} to {high:.3g} FLOPs, allowed: one budget a cell, "
                f"within {SAME_BUDGET - 1:.0%}"
            )


def _misfit(law: Fit, curve: pd.DataFrame) -> float:
    """Return the root mean square distance of the cells' means from the law, over the remaining degrees of freedom."""
    means = curve.groupby("cell")[["C", "y"]].mean()
    residuals = means["y"].to_numpy() - law.predict({"x": means["C"].to_numpy()})
    return float(np.sqrt((residuals**2).sum() / max(len(means) - len(law.parameters), 1)))


def _interval(law: Fit, drawn: Bootstrap, y: np.ndarray, means: np.ndarray, beyond: int) -> tuple[float, float]:
    """Return the 95 % interval of the compute that the reference needs for a family's mean outcome, over draws of both
    sides.

    Percentiles are those of a t-quantile with Satterthwaite's degrees of freedom of the two sides: the family's runs
    but one, and the runs of the reference `beyond` one per cell.
    """
    from scipy.special import ndtr, stdtrit

    with np.errstate(all="ignore"):
        ours = np.log(_inverse(law.parameters, means)).var()
        theirs = np.log(_inverse(drawn.values, y.mean())).var()
        degrees = (ours + theirs) ** 2 / (ours**2 / (len(y) - 1) + theirs**2 / beyond)
    tail = 100 * float(ndtr(-stdtrit(degrees if np.isfinite(degrees) else len(y) - 1, 0.975)))
    low, high = np.percentile(_inverse(drawn.values, means), [tail, 100 - tail], method="nearest")
    return float(low), float(high)


def _inverse(p: Mapping[str, Any], y: Any) -> np.ndarray:
    """Return the compute at which E + A C^-alpha = y; infinite at or below E."""
    y = np.asarray(y, float)
    with np.errstate(all="ignore"):
        return np.where(y > p["E"], (p["A"] / (y - p["E"])) ** (1 / p["alpha"]), math.inf)
