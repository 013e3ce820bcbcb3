"""What each setting of a factorial grid does to the bits stored: main effects and interactions of two levels each.

Least squares on settings coded as -1 and +1, with a constant for every seed; so every effect is a contrast of all runs
of the family, half against half (Box, Hunter and Hunter, "Statistics for Experimenters", chapters 5 and 6).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import Difference, holm
from analysis.errors import InputError
from analysis.records.grid_data import GridData
from analysis.records.runs.labels import settings_of


@dataclass(frozen=True)
class Effect:
    """How the share of bits stored changes from the low to the high level of a setting, averaged over all others.

    Attributes:
        family: Family of the runs.
        settings: One field (a main effect) or two (an interaction: half of how much the effect of the first is larger
            at the high level of the second).
        levels: Low and high level of each field.
        difference: The effect, its 95 % t-interval, its p, and the number of runs.
        adjusted: The p, adjusted by Holm's method over all effects of the family.
    """

    family: str
    settings: tuple[str, ...]
    levels: tuple[tuple[object, object], ...]
    difference: Difference
    adjusted: float


def effects(data: GridData) -> list[Effect]:
    """Return the effects of each family, main effects first, each kind from large to small.

    Interactions are included where the runs separate all of them and leave degrees of freedom.

    Raises:
        InputError: No run has storage probes, no setting varies, one has three levels or more, or main effects are not
            separable.
    """
    runs = data.done.assign(share=data.stored_share)
    runs = runs[runs["share"].notna()]
    if runs.empty:
        raise InputError("no run of this grid is done with storage probes; run it first")
    return [effect for family, own in runs.groupby("family", sort=False) for effect in _of_family(str(family), own)]


def _of_family(family: str, runs: pd.DataFrame) -> list[Effect]:
    levels, coded = _coded(family, runs)
    seeds = pd.get_dummies(runs["seed"].to_numpy()).to_numpy(float)
    main: list[tuple[str, ...]] = [(name,) for name in levels]
    for terms in ([*main, *itertools.combinations(levels, 2)], main):
        columns = [np.prod([coded[name] for name in term], axis=0) for term in terms]
        design = np.column_stack([seeds, *columns])
        if len(design) > design.shape[1] == np.linalg.matrix_rank(design):
            break
    else:
        raise InputError(
            f"{family}: {len(runs)} runs cannot separate the effects of {', '.join(levels)}; add runs in which they"
            " vary independently"
        )
    differences = _fit(design, runs["share"].to_numpy(float))[seeds.shape[1] :]
    adjusted = holm([difference.p for difference in differences])
    result = [
        Effect(family, term, tuple(levels[name] for name in term), difference, p)
        for term, difference, p in zip(terms, differences, adjusted, strict=True)
    ]
    return sorted(result, key=lambda effect: (len(effect.settings), -abs(effect.difference.mean)))


def _coded(family: str, runs: pd.DataFrame) -> tuple[dict[str, tuple[object, object]], dict[str, np.ndarray]]:
    """Return the levels of every setting that varies, low to high, and the runs' settings as -1 and +1."""
    cells = settings_of(list(runs["settings"]))
    names = sorted({name for cell in cells for name in cell})
    levels, coded = {}, {}
    for name in names:
        values = [cell.get(name) for cell in cells]
        distinct = sorted(set(map(_hashable, values)), key=lambda value: (value is not None, value))
        if len(distinct) > 2:
            shown = ", ".join(map(str, distinct))
            raise InputError(f"{name}: got {len(distinct)} levels in the runs of {family} ({shown}), allowed: two")
        if len(distinct) == 2:
            levels[name] = (distinct[0], distinct[1])
            coded[name] = np.array([1.0 if _hashable(value) == distinct[1] else -1.0 for value in values])
    if not levels:
        raise InputError(f"{family}: no setting varies but the seed, so there is no effect to estimate")
    return levels, coded


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _fit(design: np.ndarray, outcomes: np.ndarray) -> list[Difference]:
    """Return twice the coefficient of each column, the effect of a setting coded as -1 and +1, with t-intervals."""
    from scipy.special import stdtr, stdtrit

    coefficients = np.linalg.lstsq(design, outcomes, rcond=None)[0]
    free = len(design) - design.shape[1]
    variance = np.sum((outcomes - design @ coefficients) ** 2) / free
    means, errors = 2 * coefficients, 2 * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    reach = stdtrit(free, 0.975) * errors
    with np.errstate(divide="ignore"):
        p_values = 2 * stdtr(free, -np.abs(means / errors))
    rows = zip(means, means - reach, means + reach, p_values, strict=True)
    return [Difference(float(mean), float(low), float(high), float(p), len(design)) for mean, low, high, p in rows]


def markdown(estimated: list[Effect]) -> str:
    """Return the effects as a table, with a line that explains interactions if there are any."""
    lines = ["| family | setting | from | to | change of the share stored | p (Holm) | runs |", "|---" * 7 + "|"]
    for effect in estimated:
        low, high = effect.levels[0] if len(effect.levels) == 1 else ("", "")
        change = effect.difference
        points = f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}] points"
        settings = " x ".join(effect.settings)
        lines.append(
            f"| {effect.family} | {settings} | {low} | {high} | {points} | {effect.adjusted:.2g} | {change.n} |"
        )
    if any(len(effect.settings) > 1 for effect in estimated):
        lines += ["", "`a x b`: half of how much the effect of `a` rises from the low to the high level of `b`."]
    return "\n".join(lines) + "\n"
