"""The compute multiplier on families that are dense with known more compute."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.comparisons.multiplier import multipliers
from analysis.errors import InputError


def runs(compute: np.ndarray, gain: float, noise: float, seed: int, repeats: int = 4) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    c = np.repeat(compute, repeats)
    y = (1.7 + 2e3 * (gain * c) ** -0.2) * np.exp(generator.normal(0, noise, len(c)))
    return pd.DataFrame({"cell": [f"{value:.3e}" for value in c], "C": c, "y": y})


def test_a_family_worth_three_times_the_compute() -> None:
    found = multipliers(runs(np.geomspace(1e18, 1e21, 7), 1.0, 0.0, 0), runs(np.array([1e19, 1e20]), 3.0, 0.0, 1))
    assert [item.value for item in found] == pytest.approx([3.0, 3.0], rel=1e-4)
    assert not any(item.extrapolated for item in found)


def test_interval_covers_the_truth_and_narrows_with_runs() -> None:
    dense = runs(np.geomspace(1e18, 1e21, 7), 1.0, 0.003, 0)
    few, many = (multipliers(dense, runs(np.array([1e19]), 3.0, 0.003, 2, repeats))[0] for repeats in (3, 40))
    assert few.low < 3 < few.high
    assert many.high - many.low < few.high - few.low


def test_beyond_the_dense_runs_is_marked_and_beyond_the_law_is_infinite() -> None:
    dense = runs(np.geomspace(1e18, 1e20, 6), 1.0, 0.0, 0)
    far = multipliers(dense, runs(np.array([1e20]), 10.0, 0.0, 1))[0]
    assert far.extrapolated
    assert far.value == pytest.approx(10, rel=1e-2)
    beyond = multipliers(dense, pd.DataFrame({"cell": ["a"], "C": [1e20], "y": [1.0]}))[0]
    assert math.isinf(beyond.value)


def test_too_few_dense_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="3 of the 4"):
        multipliers(runs(np.array([1e18, 1e19, 1e20]), 1.0, 0.0, 0), runs(np.array([1e19]), 2.0, 0.0, 0))


@pytest.mark.slow
def test_ninety_five_percent_intervals_cover() -> None:
    hits = 0
    for seed in range(200):
        dense = runs(np.geomspace(1e18, 1e21, 7), 1.0, 0.003, 2 * seed, 5)
        found = multipliers(dense, runs(np.array([1e19]), 3.0, 0.003, 2 * seed + 1, 5), 300, seed)[0]
        hits += found.low <= 3 <= found.high
    assert 0.92 <= hits / 200 <= 0.98
