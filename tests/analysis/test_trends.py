"""The intervals of the log-linear fits cover, however few runs a cell has."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.comparisons.trends import _interval


@pytest.mark.parametrize("runs", [2, 5])
def test_ninety_five_percent_intervals_of_a_trend_cover(runs: int) -> None:
    generator, hits = np.random.default_rng(0), 0
    cells = np.repeat(np.arange(6), runs)
    x = np.stack([np.ones(6 * runs), cells], 1)
    for _ in range(2000):
        low, high = _interval(x, x @ [1.0, 0.5] + generator.normal(0, 0.1, len(x)), cells)
        hits += low[1] <= 0.5 <= high[1]
    assert 0.92 <= hits / 2000 <= 0.98
