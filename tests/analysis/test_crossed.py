"""Runs x questions: the closed forms where one of them alone varies, and coverage where both do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.comparisons.crossed import crossed_difference
from analysis.errors import InputError


@pytest.mark.parametrize("axis", [0, 1])
def test_where_one_of_them_alone_varies_it_is_that_ones_t_interval(axis: int) -> None:
    values = np.random.default_rng(0).normal(0, 1, (8, 1) if axis == 0 else (1, 400))
    found = crossed_difference(np.broadcast_to(values, (8, 400)), np.zeros((8, 400)))
    flat = values.ravel()
    ends = stats.t.interval(0.95, len(flat) - 1, flat.mean(), stats.sem(flat))
    assert found == pytest.approx((flat.mean(), *ends))


@pytest.mark.parametrize(("run", "question"), [(0.1, 0.1), (0.05, 0.2), (0.0, 0.3)])
def test_ninety_five_percent_intervals_over_runs_and_questions_cover(run: float, question: float) -> None:
    generator, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        noise = generator.normal(0, run, (5, 1)) + generator.normal(0, question, (1, 100))
        scores = noise + generator.normal(0, 0.3, (5, 100))
        _, low, high = crossed_difference(scores, np.zeros_like(scores))
        hits += low <= 0 <= high
    assert 0.92 <= hits / 1000 <= 0.98


def test_two_runs_and_two_questions_are_the_least() -> None:
    with pytest.raises(InputError, match="crossed scores"):
        crossed_difference(np.zeros((1, 4)), np.zeros((1, 4)))
