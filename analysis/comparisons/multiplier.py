"""The compute multiplier: how much dense training compute gives what a family reaches, and the interval of that.

A power law with offset is fitted to dense runs, loss (or error, 1 - accuracy) against training FLOPs, and inverted at
each cell of the family. The run is the unit: whole runs are resampled within cells, on both sides, and everything is
fitted again. An outcome better or worse than every dense run's is answered by extrapolation and marked so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.fit import Fit, Problem, fit
from analysis.fits.intervals import Bootstrap, bootstrap
from analysis.fits.laws import LAWS

DENSE_SIZES = 4
SAME_BUDGET = 1.05


@dataclass(frozen=True)
class Multiplier:
    """One cell: its mean compute and outcome, dense FLOPs for the same outcome over its own, with a 95 % interval.

    Infinite where the outcome is beyond the dense law's offset; low and high are NaN where no cell repeats.
    """

    cell: str
    flops: float
    outcome: float
    value: float
    low: float
    high: float
    runs: int
    extrapolated: bool


def multipliers(dense: pd.DataFrame, family: pd.DataFrame, draws: int = 1000, seed: int = 0) -> list[Multiplier]:
    """Multipliers of a family's cells; both tables have columns cell, C (training FLOPs) and y (loss or error, above
    0).

    Raises:
        InputError: fewer than four dense compute budgets, values a law cannot be fitted to, or a cell of the family
            that spans more than one budget.
    """
    _check("dense", dense)
    budgets = 1 + int((np.diff(np.sort(np.log(dense["C"].to_numpy(float)))) > math.log(SAME_BUDGET)).sum())
    if budgets < DENSE_SIZES:
        raise InputError(f"compute multiplier: {budgets} dense compute budgets, needed: at least {DENSE_SIZES}")
    _check("family", family)
    for cell, group in family.groupby("cell", sort=False):
        low, high = float(group["C"].min()), float(group["C"].max())
        if high > low * SAME_BUDGET:
            raise InputError(
                f"compute multiplier: cell {cell} spans {low:.3g} to {high:.3g} FLOPs, allowed: one budget a cell, "
                f"within {SAME_BUDGET - 1:.0%}"
            )
    found = fit(Problem(LAWS["power"], {"x": dense["C"].to_numpy(float)}, dense["y"].to_numpy(float)), seed)
    repeats = dense.groupby("cell").size().min() > 1
    drawn = bootstrap(found, draws, seed, strata=dense["cell"].astype(str).to_numpy()) if repeats else None
    best, worst = float(dense["y"].min()), float(dense["y"].max())
    generator = np.random.default_rng(seed)
    answers = []
    for cell, group in family.groupby("cell", sort=False):
        y, c = group["y"].to_numpy(float), float(group["C"].mean())
        value = float(_inverse(found.parameters, y.mean())) / c
        low = high = math.nan
        if drawn is not None and drawn.kept and len(y) > 1:
            means = generator.choice(y, (drawn.kept, len(y) - 1)).mean(1)
            low, high = (end / c for end in _interval(found, drawn, y, means, len(dense) - dense["cell"].nunique()))
        outside = not best <= float(y.mean()) <= worst
        answers.append(Multiplier(str(cell), c, float(y.mean()), value, low, high, len(y), outside))
    return answers


def _check(name: str, table: pd.DataFrame) -> None:
    values = table[["C", "y"]].to_numpy(float)
    if not len(table) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"compute multiplier: {name} runs need finite C and y above 0")


def _interval(found: Fit, drawn: Bootstrap, y: np.ndarray, means: np.ndarray, beyond: int) -> tuple[float, float]:
    """95 % interval of the compute dense needs for a family's mean outcome, over draws of both sides.

    Percentiles are those of a t-quantile, its degrees of freedom Satterthwaite's of the two sides: the family's runs
    but one, and the dense runs `beyond` one per cell.
    """
    from scipy.special import ndtr, stdtrit

    with np.errstate(all="ignore"):
        ours = np.log(_inverse(found.parameters, means)).var()
        theirs = np.log(_inverse(drawn.values, y.mean())).var()
        degrees = (ours + theirs) ** 2 / (ours**2 / (len(y) - 1) + theirs**2 / beyond)
    tail = 100 * float(ndtr(-stdtrit(degrees if np.isfinite(degrees) else len(y) - 1, 0.975)))
    low, high = np.percentile(_inverse(drawn.values, means), [tail, 100 - tail], method="nearest")
    return float(low), float(high)


def _inverse(p: Mapping[str, Any], y: Any) -> np.ndarray:
    """Compute at which E + A C^-alpha = y; infinite at or below E."""
    with np.errstate(all="ignore"):
        return np.where(y > p["E"], (p["A"] / (y - p["E"])) ** (1 / p["alpha"]), math.inf)
