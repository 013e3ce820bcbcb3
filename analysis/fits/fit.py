"""Fitting a law: global start, robust objective, and what can be said about the parameters.

Starts cover the nonlinear parameters with a low-discrepancy set; the linear ones are solved for at each (variable
projection, non-negative where a parameter must be), and the best starts are refined together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np

from analysis.errors import InputError
from analysis.fits.autodiff import Dual
from analysis.fits.laws import Law, Parameter
from analysis.fits.solver import minimise, objective

STARTS = 512
REFINED = 24
AGREED = 3
ROUNDS = 5
RANKED = 1000
"""Points on which starts are ranked: evenly through the table where it has more."""


@dataclass(frozen=True)
class Problem:
    """A law, its data and its objective: weights (n,) multiply the loss of the points; delta infinite: least
    squares."""

    law: Law
    x: Mapping[str, np.ndarray]
    y: np.ndarray
    delta: float = math.inf
    weights: np.ndarray | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.y)

    @property
    def different(self) -> int:
        """Number of different points: repeated runs of a cell say nothing about the law's form."""
        return np.unique(np.stack(list(self.x.values())), axis=1).shape[1]

    @property
    def w(self) -> np.ndarray:
        """Weights (n,), ones by default."""
        return np.ones(self.n) if self.weights is None else self.weights

    @property
    def free(self) -> list[Parameter]:
        """The parameters that are fitted."""
        return [parameter for parameter in self.law.parameters if parameter.name not in self.fixed]

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Parameter values (B,) from theta (B, p), fixed ones included."""
        values = {p.name: _natural(p, theta[:, i]) for i, p in enumerate(self.free)}
        return values | {name: np.full(len(theta), value) for name, value in self.fixed.items()}

    def predict(self, theta: np.ndarray, x: Mapping[str, np.ndarray]) -> np.ndarray:
        """The law at inputs x, (B, n)."""
        values = {name: value[:, None] for name, value in self.natural(theta).items()}
        with np.errstate(all="ignore"):
            return np.broadcast_to(self.law.value(values, x), (len(theta), len(next(iter(x.values())))))

    def residual(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals (B, n), law minus data (of logarithms, if the law says so), and derivatives by theta (B, n, p)."""
        shape = (len(theta), self.n)
        values: dict[str, object] = dict(self.fixed)
        for i, p in enumerate(self.free):
            natural = _natural(p, theta[:, i : i + 1])
            values[p.name] = Dual(natural, {p.name: _slope(p, natural)})
        with np.errstate(all="ignore"):
            result = self.law.value(values, self.x)
            jacobian = np.stack([np.broadcast_to(result.parts.get(p.name, 0.0), shape) for p in self.free], -1)
            value = np.broadcast_to(result.value, shape)
            if self.law.residuals == "linear":
                return value - self.y, jacobian
            return np.log(value) - np.log(self.y), jacobian / value[..., None]

    def restricted(self, rows: np.ndarray) -> Problem:
        """The same problem on some of its points."""
        weights = None if self.weights is None else self.weights[rows]
        x = {name: values[rows] for name, values in self.x.items()}
        return Problem(self.law, x, self.y[rows], self.delta, weights, self.fixed)


def _natural(parameter: Parameter, theta: np.ndarray) -> np.ndarray:
    if parameter.kind == "positive":
        return np.exp(np.clip(theta, -700, 700))
    return 1 / (1 + np.exp(-theta)) if parameter.kind == "unit" else theta


def _slope(parameter: Parameter, natural: np.ndarray) -> np.ndarray:
    if parameter.kind == "positive":
        return natural
    return natural * (1 - natural) if parameter.kind == "unit" else np.ones_like(natural)


def _theta(parameter: Parameter, natural: np.ndarray) -> np.ndarray:
    if parameter.kind == "positive":
        return np.log(natural)
    return np.log(natural / (1 - natural)) if parameter.kind == "unit" else natural


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
        """The fitted law at inputs x."""
        return self.problem.predict(self.theta[None], x)[0]

    @cached_property
    def residuals(self) -> np.ndarray:
        """Law minus data at the optimum, on the scale that was fitted."""
        return self.problem.residual(self.theta[None])[0][0]


def fit(problem: Problem, seed: int = 0) -> Fit:
    """The global optimum as far as many starts can tell; InputError where there are too few points."""
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
        raise InputError(f"law {problem.law.name}: no start gives finite predictions on these data")
    return Fit(problem, theta[0], float(value[0]), theta[np.isfinite(value)], _agreeing(problem, value))


def _searched(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Refined starts, best first, until AGREED of them end at the same optimum.

    While they do not, every start moves on by a share of the way between two others, as in differential evolution
    (Storn and Price 1997, Journal of Global Optimization 11): a small delta leaves many shallow optima close together.
    """
    theta, value = _refined(problem, _starts(problem, seed))
    generator = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        if not np.isfinite(value[0]) or _agreeing(problem, value) >= min(AGREED, len(value)):
            break
        kept = theta[:REFINED]
        first, second = generator.integers(0, len(kept), (2, len(kept)))
        way = generator.uniform(0.2, 1.0, (len(kept), 1)) * (kept[first] - kept[second])
        more, reached = _refined(problem, kept + way)
        theta, value = _best_first(np.concatenate([theta, more]), np.concatenate([value, reached]))
        theta, value = theta[: 2 * REFINED], value[: 2 * REFINED]
    return _polished(problem, theta, value)


def _refined(problem: Problem, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Down from every start, both through smoothed losses, which lead far, and straight, which keeps optima apart."""
    weights = np.broadcast_to(problem.w, (len(starts), problem.n))
    ways = (True, False) if np.isfinite(problem.delta) else (False,)
    found = [minimise(problem.residual, starts, weights, problem.delta, smooth=smooth) for smooth in ways]
    return _best_first(np.concatenate([theta for theta, _ in found]), np.concatenate([value for _, value in found]))


def _best_first(theta: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(value, kind="stable")
    return theta[order], value[order]


def _agreeing(problem: Problem, value: np.ndarray) -> int:
    """How many end where the best does."""
    return int((value <= value[0] * (1 + 1e-6) + 1e-20 * problem.n).sum())


def _polished(problem: Problem, theta: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A longer descent of the best few from where they are."""
    few = min(4, len(theta))
    weights = np.broadcast_to(problem.w, (few, problem.n))
    again, found = minimise(problem.residual, theta[:few], weights, problem.delta, iterations=400, smooth=False)
    return _best_first(np.concatenate([again, theta[few:]]), np.concatenate([found, value[few:]]))


def _starts(problem: Problem, seed: int) -> np.ndarray:
    """The REFINED best of STARTS points: nonlinear parameters spread out, linear ones solved for, as theta (B, p)."""
    if problem.n > RANKED:
        problem = problem.restricted(np.linspace(0, problem.n - 1, RANKED).astype(int))
    searched = [p for p in problem.free if not p.linear]
    ranges = problem.law.starts(problem.x)
    spread = _low_discrepancy(STARTS if searched else 1, len(searched), seed)
    natural = {name: np.full(len(spread), value) for name, value in problem.fixed.items()}
    for i, p in enumerate(searched):
        low, high = ranges.get(p.name, p.start)
        if p.kind == "positive":
            natural[p.name] = low * (high / low) ** spread[:, i]
        else:
            natural[p.name] = low + (high - low) * spread[:, i]
    natural |= _linear(problem, natural, len(spread))
    theta = np.stack([_theta(p, natural[p.name]) for p in problem.free], -1)
    value = objective(problem.residual(theta)[0], problem.w, problem.delta)
    return theta[np.argsort(value, kind="stable")[:REFINED]]


def _low_discrepancy(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Roberts' R sequence in the unit cube, shifted by the seed."""
    ratio = 2.0
    for _ in range(30):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1, dimensions + 1)
    shift = np.random.default_rng(seed).random(dimensions)
    return (shift + np.arange(1, count + 1)[:, None] * steps) % 1.0


def _linear(problem: Problem, natural: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The linear parameters of least squares (relative, for laws fitted in logarithms) at each nonlinear start."""
    linear = [p for p in problem.free if p.linear]
    if not linear:
        return {}
    scale = np.sqrt(problem.w) / (problem.y if problem.law.residuals == "log" else 1.0)

    def value(**coefficients: float) -> np.ndarray:
        filled = {p.name: np.zeros((count, 1)) for p in linear}
        filled |= {name: np.full((count, 1), number) for name, number in coefficients.items()}
        with np.errstate(all="ignore"):
            result = problem.law.value({k: v[:, None] for k, v in natural.items()} | filled, problem.x)
        return np.nan_to_num(np.broadcast_to(result, (count, problem.n)), posinf=0, neginf=0)

    constant = value()
    columns = np.stack([(value(**{p.name: 1.0}) - constant) * scale for p in linear], -1)
    target = (problem.y - constant) * scale
    solved = _non_negative(columns, target, np.array([p.kind == "positive" for p in linear]))
    typical = np.abs(target).mean() / np.maximum(np.abs(columns).mean(1), 1e-300)
    for i, p in enumerate(linear):
        if p.kind == "positive":
            solved[:, i] = np.maximum(solved[:, i], 1e-3 * typical[:, i])
    return {p.name: solved[:, i] for i, p in enumerate(linear)}


def _non_negative(columns: np.ndarray, target: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Least squares (B, n, k) @ (B, k) = (B, n), with some coefficients not below 0: the best feasible active set."""
    batch, _, k = columns.shape
    norm = lengths(columns, 1)
    gram = np.einsum("bni,bnj->bij", columns / norm[:, None], columns / norm[:, None])
    right = np.einsum("bni,bn->bi", columns / norm[:, None], target)
    best, solution = np.zeros(batch), np.zeros((batch, k))
    for size in range(1, k + 1):
        for kept in combinations(range(k), size):
            chosen = list(kept)
            part = gram[:, chosen][:, :, chosen] + 1e-10 * np.eye(size)
            found = np.linalg.solve(part, right[:, chosen, None])[:, :, 0]
            feasible = (found[:, positive[chosen]] >= 0).all(1)
            gain = (found * right[:, chosen]).sum(1)
            better = feasible & (gain > best)
            best = np.where(better, gain, best)
            replaced = np.zeros((batch, k))
            replaced[:, chosen] = found
            solution = np.where(better[:, None], replaced, solution)
    with np.errstate(over="ignore"):  # a coefficient beyond the floats ranks its start last
        return solution / norm


def lengths(columns: np.ndarray, axis: int) -> np.ndarray:
    """Euclidean lengths along an axis, above 0; scaled first, since squares in odd units would leave the floats."""
    largest = np.maximum(np.abs(columns).max(axis), 1e-300)
    squares = (columns / np.expand_dims(largest, axis)) ** 2
    return np.maximum(largest * np.sqrt(squares.sum(axis)), 1e-300)
