"""Where a search begins: nonlinear parameters spread over their ranges, linear ones solved for at each start."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from analysis.fits.problem import Problem, lengths, to_theta
from analysis.fits.solver import objective

STARTS = 512
SPREAD = 12
RANKED = 1000
"""Number of points on which starts are ranked, evenly spaced through a longer table."""


def spread_starts(problem: Problem, seed: int, count: int) -> np.ndarray:
    """Return the `count` best of STARTS points and SPREAD others that cover the ranges, as theta (B, p).

    Nonlinear parameters are spread out and linear ones solved for. The best alone can lie in one basin of several.

    Args:
        problem: The law and the data.
        seed: Seed of the spread.
        count: Number of best starts to return.
    """
    if problem.n > RANKED:
        problem = problem.restricted(np.linspace(0, problem.n - 1, RANKED).astype(int))
    searched = [p for p in problem.free if not p.linear]
    spread = _low_discrepancy(STARTS if searched else 1, len(searched), seed)
    natural = {name: np.full(len(spread), value) for name, value in problem.fixed.items()}
    for i, p in enumerate(searched):
        low, high = problem.ranges[p.name]
        if low > 0:
            natural[p.name] = low * (high / low) ** spread[:, i]
        else:
            natural[p.name] = low + (high - low) * spread[:, i]
    for name, unit in problem.law.units(
        {n: v[:, None] for n, v in natural.items() if n not in problem.law.scales}, problem.x
    ).items():
        if name in natural and name not in problem.fixed:
            natural[name] = natural[name] * unit
    natural |= _linear(problem, natural, len(spread))
    theta = np.stack([to_theta(p, natural[p.name]) for p in problem.free], -1)
    theta = np.clip(theta, problem.box.low, problem.box.high)
    value = objective(problem.residual(theta)[0], problem.w, problem.delta)
    order = np.argsort(value, kind="stable")
    rest = np.sort(order[count:])[:SPREAD]  # the first points of the sequence are spread as evenly as all of them
    return theta[np.concatenate([order[:count], rest])]


def _low_discrepancy(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Return Roberts' R sequence in the unit cube, shifted by the seed."""
    ratio = 2.0
    for _ in range(30):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1, dimensions + 1)
    shift = np.random.default_rng(seed).random(dimensions)
    return (shift + np.arange(1, count + 1)[:, None] * steps) % 1.0


def _linear(problem: Problem, natural: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Return the linear parameters of least squares (relative, for laws fitted in logarithms) at each nonlinear
    start."""
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
    solved = _non_negative(columns, target, np.array([p.low == 0 for p in linear]))
    typical = np.abs(target).mean() / np.maximum(np.abs(columns).mean(1), 1e-300)
    for i, p in enumerate(linear):
        if p.log:
            solved[:, i] = np.maximum(solved[:, i], 1e-3 * typical[:, i])
    return {p.name: solved[:, i] for i, p in enumerate(linear)}


def _non_negative(columns: np.ndarray, target: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Solve least squares (B, n, k) @ (B, k) = (B, n), with some coefficients not below 0: the best feasible active
    set."""
    batch, _, k = columns.shape
    norm = lengths(columns, 1)
    gram = np.einsum("bni,bnj->bij", columns / norm[:, None], columns / norm[:, None])
    right = np.einsum("bni,bn->bi", columns / norm[:, None], target)
    best, solution = np.zeros(batch), np.zeros((batch, k))
    for size in range(1, k + 1):
        for subset in combinations(range(k), size):
            chosen = list(subset)
            part = gram[:, chosen][:, :, chosen] + 1e-10 * np.eye(size)
            trial = np.linalg.solve(part, right[:, chosen, None])[:, :, 0]
            feasible = (trial[:, positive[chosen]] >= 0).all(1)
            gain = (trial * right[:, chosen]).sum(1)
            better = feasible & (gain > best)
            best = np.where(better, gain, best)
            replaced = np.zeros((batch, k))
            replaced[:, chosen] = trial
            solution = np.where(better[:, None], replaced, solution)
    with np.errstate(over="ignore"):  # a coefficient beyond the floats ranks its start last
        return solution / norm
