"""Profile intervals: how far each parameter can move, all others refitted, before the fit is significantly worse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from analysis.errors import InputError
from analysis.fits.fit import Fit, fit, settle
from analysis.fits.intervals import noise_scale, scaled_jacobian, theta_variance
from analysis.fits.problem import Problem, to_natural
from analysis.fits.solver import minimise, objective
from analysis.laws.law import Parameter

OPEN_AFTER = 12.0
"""A profile on a logarithmic scale that has not risen enough at this distance (a factor e^12) is open."""
CHECKED_FROM = 6
"""Number of other optima from which the ends of a profile are checked."""
NEXT_TO_BOUND = 1.10
BETTER = 1e-7
"""Relative gain by which a profile shows that the optimum was missed."""
EXACT = 1e-3
"""Relative precision of an end."""

Ends = dict[str, tuple[float, float]]


def profile(estimate: Fit, level: float = 0.95) -> Ends:
    """Compute profile intervals: where the objective, minimised over all else, has risen by the level's t-quantile
    squared.

    An end that is not reached before the parameter's bound, or within e^12 of the optimum on a logarithmic scale, is
    the bound: the interval is one-sided, or open.
    """
    return _with_vanishing_terms(estimate, _intervals(estimate, level)[0], level)


def profiled(estimate: Fit, level: float = 0.95) -> tuple[Fit, Ends]:
    """Return the fit and its profile intervals; where a profile finds a better optimum, that one and its intervals."""
    for _ in range(4):
        ends, better = _intervals(estimate, level)
        if better is None:
            break
        theta, value = settle(estimate.problem, *better)
        estimate = replace(
            estimate, theta=theta, objective=value, bank=np.concatenate([theta[None], estimate.bank]), agreeing=1
        )
    return estimate, _with_vanishing_terms(estimate, ends, level)


def _intervals(estimate: Fit, level: float) -> tuple[Ends, tuple[np.ndarray, float] | None]:
    """Compute profile intervals, and a better optimum where they find one.

    Where the profile of another parameter reaches its bound, the ends are those of a rise by a tenth more: a parameter
    next to a bounded one that is nearly collinear with it has twice the rise distributed as a mixture, chi-squared of
    0, 1, 1 and 2 degrees of freedom in equal shares, whose 95 % quantile is 1.10 times that of chi-squared.
    """
    search = _Profile(estimate, level, np.ones(len(estimate.theta)))
    ends = search.run()
    open_ = ~np.array(list(identified(estimate.problem, ends).values()))
    others = open_.sum() - open_ > 0
    if search.better is None and others.any():
        search = _Profile(estimate, level, np.where(others, NEXT_TO_BOUND, 1.0))
        ends = search.run()
    return ends, search.better


def _with_vanishing_terms(estimate: Fit, ends: Ends, level: float) -> Ends:
    """Widen the intervals if the data cannot distinguish a term of the law from zero.

    At the value 0 of some parameters (a gain, a share) others lose their meaning, so that a fit without the term has
    1 + d parameters fewer, and the rise of one parameter's profile is compared with too small a quantile (Davies 1987,
    Biometrika 74(1)). Where an F test on 1 + d degrees of freedom does not reject the fit without the term, its
    parameters are open and the intervals of all others also cover those of the fit without it.
    """
    from scipy.special import fdtri

    problem = estimate.problem
    for i, lost in _vanishing(estimate):
        parameter, degrees = problem.free[i], 1 + len(lost)
        fixed = {p.name: estimate.parameters[p.name] for p in lost} | {parameter.name: _nothing(problem, i)}
        without = replace(problem, fixed={**problem.fixed, **fixed})
        if not without.free or problem.n <= len(problem.free):
            continue
        start = estimate.theta[[p.name not in fixed for p in problem.free]][None]
        _, value = minimise(without.residual, start, problem.w[None], problem.delta, without.box)
        limit = degrees * float(fdtri(degrees, problem.n - estimate.dimension, level)) * noise_scale(estimate)
        if not 2 * (value[0] - estimate.objective) <= limit:
            continue
        try:
            others, _ = _intervals(fit(without), level)
        except InputError:  # too few different points for the remaining terms
            others = {p.name: (p.low, p.high) for p in without.free}
        for name, (low, high) in {**others, parameter.name: (0.0, 0.0)}.items():
            ends[name] = (min(ends[name][0], low), max(ends[name][1], high))
        ends |= {p.name: (p.low, p.high) for p in lost}
    return ends


def _vanishing(estimate: Fit) -> list[tuple[int, list[Parameter]]]:
    """Return the parameters at whose value 0 others have no effect on the law, and those others."""
    problem, pairs = estimate.problem, []
    for i, parameter in enumerate(problem.free):
        if not parameter.low <= 0 <= parameter.high:
            continue
        inside = np.where(estimate.bounded, problem.centre, estimate.theta)
        without = inside.copy()
        without[i] = problem.box.low[i] if parameter.log else 0.0
        size = np.abs(problem.residual(np.stack([inside, without]))[1]).max(1)
        lost = [p for j, p in enumerate(problem.free) if j != i and size[1, j] <= 1e-9 * size[0, j]]
        if lost:
            pairs.append((i, lost))
    return pairs


def _nothing(problem: Problem, i: int) -> float:
    """Return the value 0 of a parameter, or as near as a logarithmic scale comes: not every law is defined at 0."""
    return math.exp(problem.box.low[i]) if problem.free[i].log else 0.0


class _Profile:
    """The profiles of all parameters at once: a row for each parameter and side, lower sides first."""

    def __init__(self, estimate: Fit, level: float, factor: np.ndarray) -> None:
        from scipy.special import stdtrit

        problem, p = estimate.problem, len(estimate.theta)
        self.estimate, self.problem = estimate, problem
        rise = (
            0.5 * float(stdtrit(max(problem.n - estimate.dimension, 1), 0.5 + level / 2)) ** 2 * noise_scale(estimate)
        )
        rises = np.maximum(np.tile(factor, 2) * rise, 1e-15 * max(estimate.objective, 1e-300))
        self.target = estimate.objective + rises
        self.better: tuple[np.ndarray, float] | None = None
        self.side = np.concatenate([-np.ones(p), np.ones(p)])
        self.which = np.tile(np.arange(p), 2)
        errors = _theta_errors(estimate)[self.which]
        self.limit = self._limits(errors)
        self.reach = np.minimum(2 * errors, self.limit)
        log = np.array([parameter.log for parameter in problem.free])[self.which]
        self.reach[log] = np.minimum(self.reach[log], OPEN_AFTER / 4)
        self.inner, self.inner_theta = np.zeros(2 * p), np.repeat(estimate.theta[None], 2 * p, 0)
        self.direction = _tangents(estimate)[self.which] * self.side[:, None]
        self.outer = np.full(2 * p, np.nan)

    def _limits(self, errors: np.ndarray) -> np.ndarray:
        """Return how far each profile is followed: to the bound, or to a distance at which it is open."""
        box, theta, free = self.problem.box, self.estimate.theta[self.which], self.problem.free
        room = np.where(self.side < 0, theta - box.low[self.which], box.high[self.which] - theta)
        far = np.where([free[i].log for i in self.which], OPEN_AFTER, 1e4 * errors)
        inward = self.estimate.bounded[self.which] & (room > 0)
        closed = [
            math.isfinite(free[i].high if up > 0 else free[i].low) and not (free[i].log and up < 0)
            for i, up in zip(self.which, self.side, strict=True)
        ]
        return np.where(inward | np.array(closed), room, np.minimum(room, far))

    def run(self) -> Ends:
        """Expand every row until it is closed or at its limit, bisect, and check the ends from other optima."""
        again = np.flatnonzero(self.limit > 0)
        for _ in range(4):
            self._expand(again)
            self._bisect()
            again = np.union1d(self._undercut(), self._overtaken())
            if not len(again):
                break
        return self._ends()

    def _moved(self, rows: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return theta and objective of rows at a distance, from their innermost point moved along the profile.

        Where that point is worse than the innermost one itself, from the latter: the law may not be defined there.
        """
        box, problem, theta = self.problem.box, self.problem, self.inner_theta[rows]
        with np.errstate(all="ignore"):
            ahead = theta + self.direction[rows] * (distance - self.inner[rows])[:, None]
        ahead = np.clip(np.nan_to_num(ahead, nan=0.0, posinf=1e300, neginf=-1e300), box.low, box.high)
        starts = np.stack([theta, ahead])
        starts[:, np.arange(len(rows)), self.which[rows]] = self._coordinate(rows, distance)
        residuals = [problem.residual(start)[0] for start in starts]
        here, there = (objective(residual, problem.w, problem.delta) for residual in residuals)
        return self._value_at(rows, distance, np.where((there < here)[:, None], starts[1], starts[0]))

    def _advance(self, rows: np.ndarray, distance: np.ndarray, theta: np.ndarray) -> None:
        """Record points under the target as the innermost ones, and the way that led there."""
        with np.errstate(all="ignore"):
            self.direction[rows] = (theta - self.inner_theta[rows]) / (distance - self.inner[rows])[:, None]
        self.inner[rows], self.inner_theta[rows] = distance, theta

    def _coordinate(self, rows: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """Return the coordinate of each row's parameter at a distance from the optimum."""
        return np.asarray(self.estimate.theta[self.which[rows]] + self.side[rows] * distance)

    def _value_at(self, rows: np.ndarray, distance: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return theta and objective with each row's parameter held at a distance from the optimum."""
        p = len(self.estimate.theta)
        start, free = start.copy(), np.ones((len(rows), p), bool)
        index = np.arange(len(rows)), self.which[rows]
        start[index] = self._coordinate(rows, distance)
        free[index] = False
        weights = np.broadcast_to(self.problem.w, (len(rows), self.problem.n))
        problem = self.problem
        theta, value = minimise(problem.residual, start, weights, problem.delta, problem.box, free, 100)
        best = int(np.argmin(value))
        lowest = self.estimate.objective if self.better is None else self.better[1]
        if value[best] < lowest * (1 - BETTER) - problem.negligible:
            self.better = theta[best], float(value[best])
        return theta, value

    def _expand(self, pending: np.ndarray) -> None:
        for _ in range(60):
            if not len(pending):
                return
            theta, value = self._moved(pending, self.reach[pending])
            under = value < self.target[pending]
            step = self.reach[pending] - self.inner[pending]
            undefined = ~np.isfinite(value) & (step > EXACT * self.reach[pending])
            shorter = pending[undefined]
            self.reach[shorter] = self.inner[shorter] + 0.25 * step[undefined]
            closed = pending[~under & ~undefined]
            self.outer[closed] = self.reach[closed]
            self._advance(pending[under], self.reach[pending[under]], theta[under])
            farther = pending[under]
            farther = farther[self.inner[farther] < self.limit[farther]]
            self.reach[farther] = np.minimum(1.8 * self.reach[farther], self.limit[farther])
            pending = np.sort(np.concatenate([shorter, farther]))

    def _bisect(self) -> None:
        log = np.array([parameter.log for parameter in self.problem.free])[self.which]
        for _ in range(40):
            # an end next to 0 of an optimum far away is as precise as the end itself
            near = np.abs(self._coordinate(np.arange(len(self.outer)), self.outer))
            scale = np.where(log, self.outer, np.clip(near, 1e-6 * self.outer, self.outer))
            rows = np.flatnonzero(self.outer - self.inner > EXACT * scale)
            if not len(rows):
                return
            middle = 0.5 * (self.inner[rows] + self.outer[rows])
            theta, value = self._moved(rows, middle)
            below = value < self.target[rows]
            self._advance(rows[below], middle[below], theta[below])
            self.outer[rows[~below]] = middle[~below]

    def _undercut(self) -> np.ndarray:
        """Move rows outwards whose end another optimum undercuts: a path of optima can miss a valley next to it."""
        rows = np.flatnonzero(np.isfinite(self.outer))
        if not len(rows):
            return rows
        again = np.zeros(len(self.outer), bool)
        for start in _distinct(self.estimate.bank)[:CHECKED_FROM]:
            theta, value = self._value_at(rows, self.outer[rows], np.repeat(start[None], len(rows), 0))
            below = value < self.target[rows] * (1 - 1e-9)
            moved = rows[below]
            self.inner[moved], self.inner_theta[moved] = self.outer[moved], theta[below]
            again[moved] = True
        return self._reopened(np.flatnonzero(again))

    def _overtaken(self) -> np.ndarray:
        """Move rows out to points under the target that lie beyond their ends: other optima, and other profiles.

        Two terms that may exchange their places have two optima, and each one's interval must hold both.
        """
        points = np.concatenate([_distinct(self.estimate.bank), self.inner_theta])
        value = objective(self.problem.residual(points)[0], self.problem.w, self.problem.delta)
        again = []
        for row in np.flatnonzero(np.isfinite(self.outer)):
            distance = self.side[row] * (points[:, self.which[row]] - self.estimate.theta[self.which[row]])
            distance = np.where(value < self.target[row] * (1 - 1e-9), np.minimum(distance, self.limit[row]), 0.0)
            best = int(np.argmax(distance))
            if distance[best] > self.outer[row] * (1 + EXACT):
                self.inner[row], self.inner_theta[row] = distance[best], points[best]
                again.append(row)
        return self._reopened(np.array(again, int))

    def _reopened(self, rows: np.ndarray) -> np.ndarray:
        """Prepare rows that were moved out to be expanded further; return those that are not at their limit."""
        self.direction[rows] = 0.0
        self.outer[rows] = np.nan
        self.reach[rows] = np.minimum(1.3 * self.inner[rows], self.limit[rows])
        return rows[self.inner[rows] < self.limit[rows]]

    def _ends(self) -> Ends:
        """Return the natural values of the ends; a bound where a row is open."""
        p = len(self.estimate.theta)
        distance = 0.5 * (self.inner + self.outer)
        ends = []
        for row in range(2 * p):
            parameter = self.problem.free[self.which[row]]
            if math.isnan(distance[row]):
                ends.append(parameter.low if self.side[row] < 0 else parameter.high)
                continue
            theta = self.estimate.theta[self.which[row]] + self.side[row] * distance[row]
            ends.append(float(to_natural(parameter, np.array(theta))))
        return {parameter.name: (ends[i], ends[p + i]) for i, parameter in enumerate(self.problem.free)}


def _distinct(bank: np.ndarray) -> np.ndarray:
    """Return the different members of a bank of optima, in their order."""
    _, first = np.unique(np.round(bank, 3), axis=0, return_index=True)
    return bank[np.sort(first)]


def _theta_errors(estimate: Fit) -> np.ndarray:
    """Return standard errors in theta, as first steps of the profiles."""
    scaled, unit = scaled_jacobian(estimate, bounded=True)
    covariance = np.linalg.pinv(scaled.T @ scaled, rcond=1e-10)
    error = np.sqrt(np.maximum(np.diag(covariance), 1e-30) * max(theta_variance(estimate), 1e-300)) / unit
    return np.maximum(error, 1e-9 * (1 + np.abs(estimate.theta)))


def _tangents(estimate: Fit) -> np.ndarray:
    """Return how theta moves along the profile of each parameter, per unit of it, (p, p): rows of the covariance.

    A ridge lets parameters that only act together move against each other.
    """
    scaled, unit = scaled_jacobian(estimate, bounded=True)
    covariance = np.linalg.inv(scaled.T @ scaled + 1e-10 * np.eye(len(unit)))
    with np.errstate(all="ignore"):
        ways = covariance / np.diag(covariance)[:, None] * unit[:, None] / unit
    return np.nan_to_num(ways * ~estimate.bounded)


def identified(problem: Problem, ends: Ends) -> dict[str, bool]:
    """Return whether the 95 % profile of each parameter is closed on both sides."""
    return {p.name: ends[p.name][0] > p.low and ends[p.name][1] < p.high for p in problem.free}
