"""Fitting a law: a global search, and the parameters that end at a bound.

Starts cover the nonlinear parameters with a low-discrepancy set; the best are refined together. Afterwards each
parameter is moved to each of its bounds, so that one on its way to 0 or infinity ends there for every seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.errors import InputError
from analysis.fits.problem import Problem
from analysis.fits.solver import minimise, objective
from analysis.fits.starts import spread_starts

REFINED = 24
AGREED = 3
ROUNDS = 5
SAME = 1e-9
"""Relative difference below which two objectives are equal."""


@dataclass(frozen=True)
class Fit:
    """The best parameters found. `bank` holds other refined starts, which refits begin from as well."""

    problem: Problem
    theta: np.ndarray
    objective: float
    bank: np.ndarray
    agreeing: int

    @cached_property
    def parameters(self) -> dict[str, float]:
        """Parameter values by name, in the law's order."""
        values = self.problem.natural(self.theta[None])
        return {name: float(values[name][0]) for name in self.problem.law.names}

    def predict(self, x: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the fitted law at inputs x."""
        return self.problem.predict(self.theta[None], x)[0]

    @cached_property
    def bounded(self) -> np.ndarray:
        """Mask (p,) of the parameters that ended at a bound."""
        box = self.problem.box
        return (self.theta <= box.low) | (self.theta >= box.high)

    @cached_property
    def at_bound(self) -> dict[str, float]:
        """The bound of each parameter that ended at one; 0 and infinity are limits of logarithmic scales."""
        high = self.theta >= self.problem.box.high
        return {p.name: p.high if high[i] else p.low for i, p in enumerate(self.problem.free) if self.bounded[i]}

    @property
    def dimension(self) -> int:
        """Number of parameters that were free to move in the end."""
        return int((~self.bounded).sum())

    @cached_property
    def residuals(self) -> np.ndarray:
        """Law minus data at the optimum, on the scale that was fitted."""
        return self.problem.residual(self.theta[None])[0][0]


def fit(problem: Problem, seed: int = 0) -> Fit:
    """Return the best optimum of many starts; InputError if there are too few points."""
    need, different = len(problem.free) + 1, problem.different
    if problem.n < need:
        raise InputError(
            f"{problem.n} points are too few for law {problem.law.name}: "
            f"it has {len(problem.free)} parameters, so at least {need} are needed"
        )
    if different < need - 1:
        raise InputError(
            f"{problem.n} points at {different} different {', '.join(problem.x)} are too few for law "
            f"{problem.law.name}: it has {need - 1} parameters"
        )
    theta, value = _searched(problem, seed)
    if not np.isfinite(value[0]):
        raise InputError(
            f"law {problem.law.name}: no start gives finite predictions on these data{_undefined(problem)}"
        )
    agreeing = _agreeing(problem, value)
    best, reached = settle(problem, theta[0], float(value[0]))
    bank = np.concatenate([best[None], theta[np.isfinite(value)]])
    return Fit(problem, best, reached, bank, agreeing if reached >= value[0] * (1 - 1e-6) else 1)


def _undefined(problem: Problem) -> str:
    """Return the first point at which the law is not finite in the middle of its ranges."""
    bad = np.flatnonzero(~np.isfinite(problem.residual(problem.centre[None])[0][0]))
    if not len(bad):
        return ""
    return f"; the first is at {', '.join(f'{name} = {values[bad[0]]:g}' for name, values in problem.x.items())}"


def settle(problem: Problem, theta: np.ndarray, value: float) -> tuple[np.ndarray, float]:
    """Move parameters on their way to a bound there; descend further where a bound leads to a better optimum.

    Each parameter is tried at each end of its range with all others refitted, and then released. One that fits as well
    at one end stays there; one that fits as well at both is unidentified and takes the middle of its range.

    Args:
        problem: The problem.
        theta: An optimum, (p,).
        value: Its objective.

    Returns:
        The optimum, at bounds where the data lead to them, and its objective.
    """
    box, p = problem.box, len(theta)
    ends = [(i, end) for i in range(p) for end in (box.low[i], box.high[i]) if math.isfinite(end)]
    for _ in range(2 * p):
        tries = [(i, end) for i, end in ends if theta[i] not in (box.low[i], box.high[i])]
        if not tries:
            break
        start, free = np.repeat(theta[None], len(tries), 0), np.ones((len(tries), p), bool)
        for row, (i, end) in enumerate(tries):
            start[row, i], free[row, i] = end, False
        weights = np.broadcast_to(problem.w, (len(tries), problem.n))
        held, at_end = minimise(problem.residual, start, weights, problem.delta, box, free, smooth=False)
        released, below = minimise(problem.residual, held, weights, problem.delta, box, smooth=False)
        best = int(np.argmin(below))
        if below[best] < value * (1 - SAME) - problem.negligible:
            theta, value = released[best], float(below[best])
            continue
        equal = at_end <= value * (1 + SAME) + problem.negligible
        ways = [int(equal[[row for row, (j, _) in enumerate(tries) if j == i]].sum()) for i in range(p)]
        rows = [row for row, (i, _) in enumerate(tries) if equal[row] and ways[i] == 1]
        if not rows:
            return _centred(problem, theta, value, [i for i in range(p) if ways[i] == 2])
        theta, value = held[rows[0]], min(value, float(at_end[rows[0]]))
    return theta, value


def _centred(problem: Problem, theta: np.ndarray, value: float, flat: list[int]) -> tuple[np.ndarray, float]:
    """Move unidentified parameters to the middle of their ranges, where that fits as well."""
    for i in flat:
        moved = theta.copy()
        moved[i] = problem.centre[i]
        reached = objective(problem.residual(moved[None])[0], problem.w, problem.delta)[0]
        if reached <= value * (1 + SAME) + problem.negligible:
            theta, value = moved, float(reached)
    return theta, value


def _searched(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the refined starts, best first, until AGREED of them end at the same optimum.

    While they do not, every start moves on by a share of the way between two others, as in differential evolution
    (Storn and Price 1997, Journal of Global Optimization 11): a small delta leaves many shallow optima close together.
    """
    theta, value = _refined(problem, spread_starts(problem, seed, REFINED))
    generator = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        if not np.isfinite(value[0]) or _agreeing(problem, value) >= min(AGREED, len(value)):
            break
        best = theta[:REFINED]
        first, second = generator.integers(0, len(best), (2, len(best)))
        way = generator.uniform(0.2, 1.0, (len(best), 1)) * (best[first] - best[second])
        more, reached = _refined(problem, best + way)
        theta, value = _best_first(np.concatenate([theta, more]), np.concatenate([value, reached]))
        theta, value = theta[: 2 * REFINED], value[: 2 * REFINED]
    return _polished(problem, theta, value)


def _refined(problem: Problem, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descend from every start, through smoothed losses, which reach far, and directly, which reaches more optima."""
    weights = np.broadcast_to(problem.w, (len(starts), problem.n))
    ways = (True, False) if np.isfinite(problem.delta) else (False,)
    tries = [minimise(problem.residual, starts, weights, problem.delta, problem.box, smooth=smooth) for smooth in ways]
    return _best_first(np.concatenate([theta for theta, _ in tries]), np.concatenate([value for _, value in tries]))


def _best_first(theta: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(value, kind="stable")
    return theta[order], value[order]


def _agreeing(problem: Problem, value: np.ndarray) -> int:
    """Return how many end where the best does."""
    return int((value <= value[0] * (1 + 1e-6) + problem.negligible).sum())


def _polished(problem: Problem, theta: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a longer descent of the best few from where they are."""
    few = min(4, len(theta))
    weights = np.broadcast_to(problem.w, (few, problem.n))
    longer, longer_value = minimise(
        problem.residual, theta[:few], weights, problem.delta, problem.box, iterations=400, smooth=False
    )
    return _best_first(np.concatenate([longer, theta[few:]]), np.concatenate([longer_value, value[few:]]))
