"""Differences and their intervals as text, for the report's tables."""

from __future__ import annotations

import math

from analysis.comparisons.statistics import Difference
from analysis.records.tables import number, signed


def with_interval(difference: Difference | None, digits: int = 3, sign: bool = False) -> str:
    """Return `mean [low, high]`, or the mean alone below MIN_PAIRS.

    Args:
        difference: The difference; None if there is none.
        digits: Significant digits.
        sign: Whether to write the sign of positive numbers.
    """
    if difference is None or difference.n == 0:
        return "–"
    write = signed if sign else number
    mean, low, high = (write(value, digits) for value in (difference.mean, difference.low, difference.high))
    return mean if math.isnan(difference.low) else f"{mean} [{low}, {high}]"


def exp_cell(difference: Difference | None) -> str:
    """Return the ratio whose logarithm the difference is, with its interval."""
    if difference is None:
        return "–"
    mean, low, high = (math.exp(value) for value in (difference.mean, difference.low, difference.high))
    return with_interval(Difference(mean, low, high, difference.p, difference.n))


def documents(key: str, n: float) -> str:
    """Return the number of documents of a score: of the text for `held_out`, and questions for other tasks.

    Args:
        key: TASK/METRIC.
        n: The number.
    """
    name = "document" if key.startswith("held_out/") else "question"
    return f"{n:,.0f} {name}{'' if n == 1 else 's'}"
