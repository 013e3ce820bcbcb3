"""Means with t-intervals, many at once, and tests over pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_PAIRS = 5
"""Fewest pairs for which a mean has an interval."""


@dataclass(frozen=True)
class Difference:
    """A mean of n values, its 95 % t-interval and the p of a t-test against 0; NaN below MIN_PAIRS values."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def paired(differences: np.ndarray) -> Difference:
    """Return the mean of paired differences, or of one variant's runs, with its 95 % t-interval."""
    values = np.asarray(differences, float)
    return paired_by_group(values, np.zeros(len(values), int), 1)[0]


def paired_by_group(values: np.ndarray, group: np.ndarray, groups: int) -> list[Difference]:
    """Compute `paired` for many sets of values.

    Args:
        values: (n,).
        group: The set of each value, (n,), from 0 to groups - 1.
        groups: Number of sets; one without values has n = 0.
    """
    from scipy.special import stdtr, stdtrit

    count = np.bincount(group, minlength=groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(group, values, groups) / count
        spread = np.sqrt(np.bincount(group, (values - mean[group]) ** 2, groups) / (count - 1))
        error = np.where(count >= MIN_PAIRS, spread / np.sqrt(count), np.nan)
        free = np.maximum(count - 1, 1)
        reach = stdtrit(free, 0.975) * error
        p = np.where(error == 0, np.where(mean == 0, 1.0, 0.0), 2 * stdtr(free, -np.abs(mean / error)))
    columns = (mean, mean - reach, mean + reach, np.where(count >= MIN_PAIRS, p, np.nan))
    rows = zip(np.stack(columns, 1).tolist(), count.tolist(), strict=True)
    return [Difference(middle, low, high, p, n) for (middle, low, high, p), n in rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values; NaN stays NaN and is not counted."""
    order = sorted((p, position) for position, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[position] = largest
    return adjusted


def sign_test(lower: int, higher: int) -> float:
    """Return the exact two-sided binomial p of `lower` against `higher` at equal chances; NaN below MIN_PAIRS pairs."""
    n = lower + higher
    if n < MIN_PAIRS:
        return float("nan")
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1)) / 2**n
    return min(1.0, 2 * tail)
