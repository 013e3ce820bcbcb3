"""Differences and their intervals in words, for the report's tables."""

from __future__ import annotations

import math

from analysis.comparisons.paired import Difference
from analysis.records.tables import number, signed


def with_interval(found: Difference | None, digits: int = 3, sign: bool = False) -> str:
    """mean [low, high], or the mean alone below MIN_PAIRS."""
    if found is None or found.n == 0:
        return "–"
    write = signed if sign else number
    text = write(found.mean, digits)
    return text if math.isnan(found.low) else f"{text} [{write(found.low, digits)}, {write(found.high, digits)}]"


def exp_cell(found: Difference | None) -> str:
    """The ratio whose logarithm the difference is, with its interval."""
    if found is None:
        return "–"
    return with_interval(Difference(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.p, found.n))
