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
def test_ninety_five_percent_intervals_of_a_multiplier_cover() -> None:
    hits = 0
    for seed in range(200):
        dense = runs(np.geomspace(1e18, 1e21, 7), 1.0, 0.003, 2 * seed, 5)
        found = multipliers(dense, runs(np.array([1e19]), 3.0, 0.003, 2 * seed + 1, 5), 300, seed)[0]
        hits += found.low <= 3 <= found.high
    assert 0.92 <= hits / 200 <= 0.98


def test_a_family_better_at_every_size_and_budget_never_needs_more_compute() -> None:
    """Loss of N and D is not a function of C: runs off the reference's envelope neither enter its curve nor are judged
    by it."""
    generator, rows = np.random.default_rng(0), []
    for n in (1e7, 2e7, 4e7, 8e7, 16e7):
        for ratio in (5, 10, 20, 40):
            for family, gain in (("reference", 1.0), ("better", 1.5)):
                for _ in range(3):
                    loss = 1.8 + 482 * (n * gain) ** -0.348 + 2085 * (n * ratio) ** -0.366
                    loss *= np.exp(generator.normal(0, 0.001))
                    rows.append((family, f"{n:.0e}-{ratio}", 6 * n * n * ratio, loss))
    table = pd.DataFrame(rows, columns=["family", "cell", "C", "y"])
    parts = [table[table["family"] == family] for family in ("reference", "better")]
    assert (parts[1].groupby("cell")["y"].mean() < parts[0].groupby("cell")["y"].mean()).all()
    items = multipliers(*parts, draws=50)
    answered = [item for item in items if item.reason is None]
    assert len(answered) >= 10
    assert all(1 < item.value < 2 for item in answered)
    refused = {item.cell for item in items if item.reason is not None}
    assert {"2e+07-5", "4e+07-5", "8e+07-5", "2e+08-5"} <= refused
    assert all(math.isnan(item.value) for item in items if item.cell in refused)


def test_a_multiplier_closer_to_the_curve_than_its_misfit_is_refused() -> None:
    reference = runs(np.geomspace(1e18, 1e21, 7), 1.0, 0.0, 0)
    bent = reference.assign(y=reference["y"] * (1 + 0.01 * (reference.groupby("cell", sort=False).ngroup() % 2)))
    near = runs(np.array([1.1e19]), 1.0, 0.0, 1)
    same = multipliers(bent, near.assign(y=near["y"] * 1.005))
    far = multipliers(bent, runs(np.array([1e19]), 9.0, 0.0, 1))
    assert same[0].misfit == far[0].misfit > 0.005
    assert same[0].reason is not None
    assert f"{same[0].misfit:.2g}" in same[0].reason
    assert math.isnan(same[0].value)
    assert far[0].reason is None
    assert far[0].value == pytest.approx(9, rel=0.5)
