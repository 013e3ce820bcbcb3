"""Intervals of what follows from a fit: a prediction, an optimal size, a loss at a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from analysis.fits.fit import Fit
from analysis.fits.intervals import noise_scale, scaled_jacobian, theta_variance
from analysis.fits.problem import Problem
from analysis.fits.profile import NEXT_TO_BOUND, Ends, identified
from analysis.fits.solver import Box, minimise, objective

Quantity = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta (B, p) -> a value (B,) and its derivatives (B, p)."""
Quantities = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta (B, p) and which quantity each row is about (B,) -> values (B,) and their derivatives (B, p)."""
STIFF = 300.0
"""How many times as strongly as the data a quantity is held at its value."""
FAR = 200.0
"""A quantity that has not become implausible at this many standard errors has an open interval."""
HALVINGS = 14


def interval(estimate: Fit, quantity: Quantity, ends: Ends, level: float = 0.95) -> tuple[float, float]:
    """Return the profile interval of one quantity, as `intervals` does of several.

    Args:
        estimate: The fit.
        quantity: theta (B, p) -> values (B,) and their derivatives (B, p).
        ends: The profile intervals of the fit's parameters.
        level: Of confidence.
    """
    low, high = intervals(estimate, lambda theta, which: quantity(theta), 1, ends, level)[0]
    return float(low), float(high)


def intervals(estimate: Fit, quantities: Quantities, count: int, ends: Ends, level: float = 0.95) -> np.ndarray:
    """Return the profile intervals of quantities: the values at which a refit is not significantly worse.

    Args:
        estimate: The fit.
        quantities: What to find the intervals of, on scales on which they are about linear.
        count: How many there are.
        ends: The profile intervals of the fit's parameters; one that reaches a bound widens these.
        level: Of confidence.

    Returns:
        Lower and upper ends, (count, 2); infinite where the data do not bound the quantity.
    """
    from scipy.special import stdtrit

    problem, noise, which = estimate.problem, noise_scale(estimate), np.arange(count)
    value, slope = quantities(np.repeat(estimate.theta[None], count, 0), which)
    error = _standard_errors(estimate, slope)
    result = np.stack([value, value], -1)
    usable = np.isfinite(value) & (error > 0)
    if not noise > 0 or not usable.any():
        return np.where(np.isfinite(result), result, math.nan)
    factor = 1.0 if all(identified(problem, ends).values()) else NEXT_TO_BOUND
    rise = 0.5 * float(stdtrit(max(problem.n - estimate.dimension, 1), 0.5 + level / 2)) ** 2 * noise * factor
    held = _Held(estimate, quantities, which[usable], value[usable], error[usable], STIFF * math.sqrt(noise))
    result[usable] = held.ends(estimate.objective + rise)
    return np.where(np.isnan(value)[:, None], math.nan, result)


def _standard_errors(estimate: Fit, slope: np.ndarray) -> np.ndarray:
    """Return standard errors by the delta method, first steps of the profiles, from derivatives (B, p)."""
    scaled, unit = scaled_jacobian(estimate, bounded=True)
    covariance = np.linalg.pinv(scaled.T @ scaled, rcond=1e-10)
    direction = np.nan_to_num(slope) / unit
    variance = np.einsum("bi,ij,bj->b", direction, covariance, direction)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0) * theta_variance(estimate)))


@dataclass(frozen=True)
class _Held:
    """Refits with quantities held at values, by a stiff residual: theta is followed by its target and which it is.

    This is not the search of a parameter's profile, which fixes a coordinate of theta exactly, follows the profile's
    tangent and ends at the parameter's bound: a quantity is not a coordinate and has no bound.

    A row is a quantity and a side; lower sides come first.
    """

    estimate: Fit
    quantities: Quantities
    which: np.ndarray
    value: np.ndarray
    error: np.ndarray
    stiffness: float

    def ends(self, target: float) -> np.ndarray:
        """Return where the objective reaches the target on both sides, (count, 2); infinite where it does not.

        The way out begins at the farthest of the other optima under the target.
        """
        count = len(self.which)
        side = np.repeat([-1.0, 1.0], count)
        step, centre = side * np.tile(self.error, 2), np.tile(self.value, 2)
        inner, theta = self._overtaken(target, side)
        outer, reach = np.full(2 * count, math.nan), np.maximum(1.0, 1.6 * inner)
        pending = np.arange(2 * count)
        while len(pending):
            below = self._advance(pending, reach, step, centre, target, inner, theta)
            outer[pending[~below]] = reach[pending[~below]]
            reach[pending] *= 1.6
            pending = pending[below & (reach[pending] <= FAR)]
        closed = np.flatnonzero(np.isfinite(outer))
        for _ in range(HALVINGS):
            middle = 0.5 * (inner + outer)
            below = self._advance(closed, middle, step, centre, target, inner, theta)
            outer[closed[~below]] = middle[closed[~below]]
        distance = np.where(np.isfinite(outer), 0.5 * (inner + outer), math.inf)
        return np.asarray((centre + distance * step).reshape(2, count).T)

    def _overtaken(self, target: float, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far each row's quantity lies at another optimum under the target, and that theta; else 0."""
        problem, count = self.estimate.problem, len(self.which)
        reached = objective(problem.residual(self.estimate.bank)[0], problem.w, problem.delta)
        bank = np.concatenate([self.estimate.theta[None], self.estimate.bank[reached < target]])
        away = np.stack([self.quantities(bank, np.full(len(bank), i))[0] for i in self.which]) - self.value[:, None]
        distance = np.nan_to_num(np.concatenate([away, away]) * side[:, None] / np.tile(self.error, 2)[:, None])
        distance[:, 0] = 0.0
        best = distance.argmax(1)
        return np.minimum(distance[np.arange(2 * count), best], FAR), bank[best]

    def _advance(
        self,
        rows: np.ndarray,
        reach: np.ndarray,
        step: np.ndarray,
        centre: np.ndarray,
        target: float,
        inner: np.ndarray,
        theta: np.ndarray,
    ) -> np.ndarray:
        """Refit rows at a distance, record those under the target as the innermost, and return which they are."""
        moved, value = self._refit(rows, (centre + reach * step)[rows], theta[rows])
        below = value < target
        inner[rows[below]], theta[rows[below]] = reach[rows[below]], moved[below]
        return np.asarray(below)

    def _refit(self, rows: np.ndarray, at: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best fits with the quantities held, from the last ones and from the optimum."""
        problem, (count, p) = self.estimate.problem, theta.shape
        which = self.which[rows % len(self.which)]
        starts = np.concatenate([theta, np.repeat(self.estimate.theta[None], count, 0)])
        starts = np.column_stack([starts, np.tile(at, 2), np.tile(which, 2)])
        free = np.ones((2 * count, p + 2), bool)
        free[:, p:] = False
        box, ones = problem.box, np.full(2, math.inf)
        wide = Box(np.append(box.low, -ones), np.append(box.high, ones), np.append(box.reach, ones))
        weights = np.broadcast_to(np.append(problem.w, 1.0), (2 * count, problem.n + 1))
        moved, value = minimise(self._residual, starts, weights, problem.delta, wide, free, 100, smooth=False)
        first = (value[:count] <= value[count:])[:, None]
        return np.where(first, moved[:count, :p], moved[count:, :p]), np.minimum(value[:count], value[count:])

    def _residual(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = theta.shape[1] - 2
        which = theta[:, p + 1].astype(int)
        residual, jacobian = self.estimate.problem.residual(theta[:, :p])
        value, slope = self.quantities(theta[:, :p], which)
        errors = np.zeros(int(self.which.max()) + 1)
        errors[self.which] = self.error
        stiffness = self.stiffness / errors[which]
        wide = np.zeros((len(theta), residual.shape[1] + 1, p + 2))
        wide[:, :-1, :p] = jacobian
        wide[:, -1, :p] = stiffness[:, None] * slope
        return np.column_stack([residual, stiffness * (value - theta[:, p])]), wide


def predictions(estimate: Fit, x: Mapping[str, np.ndarray]) -> Quantities:
    """Return the law at points x, (count,) each, on the scale that was fitted."""
    problem = estimate.problem
    y = np.ones(1) if problem.law.residuals == "log" else np.zeros(1)

    def quantities(theta: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = {name: np.asarray(x[name], float)[which][:, None] for name in problem.law.inputs}
        value, slope = Problem(problem.law, points, y, fixed=problem.fixed).residual(theta)
        return value[:, 0], slope[:, 0]

    return quantities


def prediction(estimate: Fit, x: Mapping[str, float]) -> Quantity:
    """Return the law at one point, on the scale that was fitted."""
    quantities = predictions(estimate, {name: np.array([float(x[name])]) for name in estimate.problem.law.inputs})
    return lambda theta: quantities(theta, np.zeros(len(theta), int))


def by_differences(value: Callable[[np.ndarray], np.ndarray], step: float = 1e-3) -> Quantity:
    """Return a quantity from its value (B, p) -> (B,) alone, with derivatives by central differences."""

    def quantity(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, p = theta.shape
        width = step * np.maximum(np.abs(theta), 1.0)
        shifts = np.eye(p)[None] * width[:, None]
        points = np.concatenate([theta[:, None] + shifts, theta[:, None] - shifts], 1).reshape(-1, p)
        moved = value(points).reshape(batch, 2, p)
        return value(theta), (moved[:, 0] - moved[:, 1]) / (2 * width)

    return quantity
