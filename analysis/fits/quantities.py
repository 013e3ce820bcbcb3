"""Intervals of what follows from a fit: a prediction, an optimal size, a loss at a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from analysis.fits.fit import Fit
from analysis.fits.intervals import noise_scale, scaled_jacobian, theta_variance
from analysis.fits.profile import NEXT_TO_BOUND, Ends, identified
from analysis.fits.solver import Box, minimise

Quantity = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta (B, p) -> a value (B,) and its derivatives (B, p)."""
STIFF = 300.0
"""How many times as strongly as the data a quantity is held at its value."""
FAR = 200.0
"""A quantity that has not become implausible at this many standard errors has an open interval."""


def interval(estimate: Fit, quantity: Quantity, ends: Ends, level: float = 0.95) -> tuple[float, float]:
    """Return the profile interval of a quantity: the values at which a refit is not significantly worse.

    Args:
        estimate: The fit.
        quantity: What to find the interval of, on a scale on which it is about linear.
        ends: The profile intervals of the fit's parameters; one that reaches a bound widens this one.
        level: Of confidence.

    Returns:
        Lower and upper end; infinite where the data do not bound the quantity.
    """
    from scipy.special import stdtrit

    problem, noise = estimate.problem, noise_scale(estimate)
    value, slope = (part[0] for part in quantity(estimate.theta[None]))
    error = _standard_error(estimate, slope)
    if not math.isfinite(value) or not error > 0 or not noise > 0:
        return (float(value), float(value)) if math.isfinite(value) else (math.nan, math.nan)
    factor = 1.0 if all(identified(problem, ends).values()) else NEXT_TO_BOUND
    rise = 0.5 * float(stdtrit(max(problem.n - estimate.dimension, 1), 0.5 + level / 2)) ** 2 * noise * factor
    held = _Held(estimate, quantity, STIFF * math.sqrt(noise) / error)
    low, high = (held.end(float(value), side * error, estimate.objective + rise) for side in (-1.0, 1.0))
    return low, high


def _standard_error(estimate: Fit, slope: np.ndarray) -> float:
    """Return the quantity's standard error by the delta method, a first step of its profile."""
    scaled, unit = scaled_jacobian(estimate, bounded=True)
    covariance = np.linalg.pinv(scaled.T @ scaled, rcond=1e-10)
    direction = np.nan_to_num(slope) / unit
    return math.sqrt(max(float(direction @ covariance @ direction), 0.0) * theta_variance(estimate))


@dataclass(frozen=True)
class _Held:
    """Refits with a quantity held at a value, by a stiff residual whose target is a last coordinate of theta."""

    estimate: Fit
    quantity: Quantity
    stiffness: float

    def end(self, value: float, step: float, target: float) -> float:
        """Return where the objective reaches the target in the direction of `step`; infinite where it does not."""
        inner, outer, reach, theta = 0.0, math.nan, 1.0, self.estimate.theta
        while reach <= FAR:
            moved, objective = self._refit(value + reach * step, theta)
            if not objective < target:
                outer = reach
                break
            inner, theta, reach = reach, moved, 1.6 * reach
        if math.isnan(outer):
            return math.copysign(math.inf, step)
        for _ in range(14):
            middle = 0.5 * (inner + outer)
            moved, objective = self._refit(value + middle * step, theta)
            if objective < target:
                inner, theta = middle, moved
            else:
                outer = middle
        return value + 0.5 * (inner + outer) * step

    def _refit(self, at: float, theta: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the best fit with the quantity held, from the last one and from the optimum."""
        problem, p = self.estimate.problem, len(theta)
        starts = np.column_stack([np.stack([theta, self.estimate.theta]), np.full(2, at)])
        free = np.ones((2, p + 1), bool)
        free[:, p] = False
        box = problem.box
        wide = Box(np.append(box.low, -np.inf), np.append(box.high, np.inf), np.append(box.reach, np.inf))
        weights = np.broadcast_to(np.append(problem.w, 1.0), (2, problem.n + 1))
        moved, value = minimise(self._residual, starts, weights, problem.delta, wide, free, 100, smooth=False)
        best = int(np.argmin(value))
        return moved[best, :p], float(value[best])

    def _residual(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = theta.shape[1] - 1
        residual, jacobian = self.estimate.problem.residual(theta[:, :p])
        value, slope = self.quantity(theta[:, :p])
        last = self.stiffness * (value - theta[:, p])
        wide = np.zeros((*residual.shape[:1], residual.shape[1] + 1, p + 1))
        wide[:, :-1, :p] = jacobian
        wide[:, -1, :p] = self.stiffness * slope
        return np.column_stack([residual, last]), wide


def prediction(estimate: Fit, x: Mapping[str, float]) -> Quantity:
    """Return the law at one point, on the scale that was fitted."""
    problem = estimate.problem
    point = {name: np.array([float(x[name])]) for name in problem.law.inputs}
    y = np.ones(1) if problem.law.residuals == "log" else np.zeros(1)
    single = type(problem)(problem.law, point, y, fixed=problem.fixed)

    def quantity(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = single.residual(theta)
        return value[:, 0], slope[:, 0]

    return quantity


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
