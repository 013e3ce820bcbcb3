"""Scores of runs on shared questions: the interval of a mean difference with runs and questions as random effects."""

from __future__ import annotations

import math

import numpy as np

from analysis.errors import InputError


def crossed_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Return the mean difference of two (runs, questions) arrays of scores, and the ends of its 95 % interval.

    Questions are shared, and runs are paired by row (one seed each). Two-way random effects: the variance of the mean
    is (MS_runs + MS_questions - MS_rest) / (runs questions), and at least that of either effect alone, with
    Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2(6)).

    Raises:
        InputError: Arrays of different shapes, or fewer than two runs or questions.
    """
    from scipy.special import stdtrit

    if ours.shape != theirs.shape or ours.ndim != 2 or min(ours.shape) < 2:
        raise InputError(
            f"crossed scores: got {ours.shape} and {theirs.shape}, allowed: the same (runs, questions), 2 or more"
        )
    difference = ours - theirs
    runs, questions = difference.shape
    mean = difference.mean()
    by_run, by_question = difference.mean(1) - mean, difference.mean(0) - mean
    rest = difference - mean - by_run[:, None] - by_question
    free = np.array([runs - 1, questions - 1, (runs - 1) * (questions - 1)], float)
    squares = np.array([questions * (by_run**2).sum(), runs * (by_question**2).sum(), (rest**2).sum()]) / free
    both = float(squares[0] + squares[1] - squares[2])
    kinds = [(float(squares[0]), free[0]), (float(squares[1]), free[1])]
    if both > max(squares[0], squares[1]):
        kinds.append((both, both**2 / float((squares**2 / free).sum())))
    variance, degrees = max(kinds)
    reach = float(stdtrit(degrees, 0.975)) * math.sqrt(variance / (runs * questions))
    return float(mean), float(mean) - reach, float(mean) + reach
