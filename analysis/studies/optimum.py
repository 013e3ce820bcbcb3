"""Compute-optimal allocation: the size and the tokens with the least loss at a budget, with intervals."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.errors import InputError
from analysis.fits.fit import Fit
from analysis.fits.profile import Ends
from analysis.fits.quantities import by_differences, interval, prediction
from analysis.laws.formula import evaluate, names, parse

GRID = 801
SPAN = 1e4
"""Factor by which the search for an optimum extends beyond the fitted sizes."""
NOT_INSIDE = "no minimum among the sizes searched"
DEFAULT_FLOPS = "6*N*D"


def flops_formula(text: str) -> ast.expr:
    """Return the FLOPs of training as a formula of N and D."""
    tree = parse(text, "--flops")
    if sorted(names(tree)) != ["D", "N"]:
        raise InputError(f"--flops: got {text!r}, allowed: a formula of N and D, as in {DEFAULT_FLOPS}")
    return tree


def optimum(
    estimate: Fit, ends: Ends, budget: float, flops: ast.expr, at: Mapping[str, float], ratio: float | None = None
) -> dict[str, Any]:
    """Return the best N and D at a budget.

    Args:
        estimate: A fit of a law with inputs N and D.
        ends: Profile intervals of its parameters.
        budget: Training FLOPs.
        flops: The FLOPs as a formula of N and D, rising in D.
        at: Values of the law's other inputs.
        ratio: Tokens per parameter at which the loss at this budget is also wanted.

    Returns:
        `N`, `D`, `loss` and their 95 % intervals, `ratio` D/N; `inside` where the optimum is not at an end of the
        sizes searched; with `ratio` the same at that ratio as `at_ratio`.
    """
    law = estimate.problem.law
    for name in ("N", "D"):
        if name not in law.inputs:
            raise InputError(f"optimum: law {law.name} has no input {name}; it needs N and D")
    missing = [name for name in law.inputs if name not in ("N", "D") and name not in at]
    if missing:
        raise InputError(f"--at: {missing[0]} is missing; law {law.name} has it as an input")
    search = _Search(estimate, budget, flops, at)
    log_n, loss = (float(part[0]) for part in search.best(estimate.theta[None]))
    inside = search.inside(log_n)
    n_ends = interval(estimate, by_differences(lambda theta: search.best(theta)[0]), ends)
    loss_ends = interval(estimate, by_differences(lambda theta: search.best(theta)[1]), ends)
    if not inside:
        n_ends = (-math.inf, math.inf)
    sizes = [search.n_at(end) for end in n_ends]
    n = math.exp(log_n)
    d = float(search.tokens(np.array([n]))[0])
    result: dict[str, Any] = {
        "C": budget,
        "N": n,
        "N_interval": sizes,
        "D": d,
        "D_interval": [search.d_at(end) for end in reversed(sizes)],
        "ratio": d / n,
        "loss": search.natural(loss),
        "loss_interval": [search.natural(end) for end in loss_ends],
        "inside": inside,
    }
    if ratio is not None:
        result["at_ratio"] = search.at_ratio(ratio, ends)
    return result


def from_frontier(estimate: Fit, ends: Ends, budget: float, flops: ast.expr) -> dict[str, Any]:
    """Return N and D at a budget from a fitted frontier Nopt = k C^a of isoFLOP optima.

    Args:
        estimate: The fit of the frontier.
        ends: Profile intervals of its parameters.
        budget: Training FLOPs.
        flops: The FLOPs as a formula of N and D.
    """
    value, (low, high) = (
        estimate.predict({"C": np.array([budget])})[0],
        interval(estimate, prediction(estimate, {"C": budget}), ends),
    )
    sizes = [math.exp(low) if low < 700 else math.inf, math.exp(high) if high < 700 else math.inf]
    tokens = [_tokens(flops, budget, np.array([size]))[0] for size in (value, *sizes)]
    budgets = estimate.problem.x["C"]
    return {
        "C": budget,
        "N": float(value),
        "N_interval": sizes,
        "D": float(tokens[0]),
        "D_interval": [float(tokens[2]), float(tokens[1])],
        "ratio": float(tokens[0] / value),
        "inside": bool(budgets.min() * 0.999 <= budget <= budgets.max() * 1.001),
    }


def _tokens(flops: ast.expr, budget: float, n: np.ndarray) -> np.ndarray:
    """Return tokens that a budget buys at each size, by bisection of log D; NaN where none or any number does."""
    low, high = np.full(len(n), -5.0), np.full(len(n), 120.0)

    def cost(log_d: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray(evaluate(flops, {"N": n, "D": np.exp(log_d)}), float) + np.zeros(len(n))

    reached = (cost(low) < budget) & (cost(high) > budget)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = cost(middle) > budget
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(reached, np.exp(0.5 * (low + high)), np.nan)


class _Search:
    """The loss along a budget, over a grid of sizes."""

    def __init__(self, estimate: Fit, budget: float, flops: ast.expr, at: Mapping[str, float]) -> None:
        self.estimate, self.flops, self.budget, self.at = estimate, flops, budget, dict(at)
        sizes = estimate.problem.x["N"]
        self.grid = np.linspace(math.log(sizes.min() / SPAN), math.log(sizes.max() * SPAN), GRID)
        self.d = self.tokens(np.exp(self.grid))
        usable = np.isfinite(self.d) & (self.d >= 1)
        if usable.sum() < 5:
            raise InputError(f"--budget: got {budget:g} FLOPs, which --flops does not reach at the sizes fitted")
        self.grid, self.d = self.grid[usable], self.d[usable]

    def tokens(self, n: np.ndarray) -> np.ndarray:
        """Return tokens that the budget buys at each size."""
        return _tokens(self.flops, self.budget, n)

    def losses(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Return the law on the fitted scale, (B, n)."""
        x = {"N": n, "D": d} | {name: np.full(len(n), value) for name, value in self.at.items()}
        value = self.estimate.problem.predict(theta, x)
        with np.errstate(all="ignore"):
            return np.log(value) if self.estimate.problem.law.residuals == "log" else value

    def best(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log N at the least loss, (B,), and that loss: the vertex of a parabola through the three lowest
        points."""
        value = self.losses(theta, np.exp(self.grid), self.d)
        loss = np.where(np.isfinite(value), value, np.inf)
        rows, i = np.arange(len(theta)), np.clip(loss.argmin(1), 1, len(self.grid) - 2)
        low, middle, high = loss[rows, i - 1], loss[rows, i], loss[rows, i + 1]
        with np.errstate(all="ignore"):
            shift = np.clip(np.nan_to_num(0.5 * (low - high) / (low - 2 * middle + high)), -1, 1)
            vertex = middle - 0.25 * (low - high) * shift
        return self.grid[i] + (self.grid[1] - self.grid[0]) * shift, np.where(np.isfinite(vertex), vertex, middle)

    def inside(self, log_n: float) -> bool:
        """Return whether the optimum is a minimum, not an end of the sizes searched."""
        return bool(self.grid[1] < log_n < self.grid[-2])

    def n_at(self, log_n: float) -> float:
        return math.exp(log_n) if log_n < 700 else math.inf

    def d_at(self, n: float) -> float:
        """Return tokens at a size, for the other end of an interval."""
        if n == 0 or math.isinf(n):
            return math.inf if n == 0 else 0.0
        return float(self.tokens(np.array([n]))[0])

    def natural(self, loss: float) -> float:
        """Return a loss from the fitted scale."""
        if self.estimate.problem.law.residuals != "log":
            return loss
        return math.exp(loss) if loss < 700 else math.inf

    def at_ratio(self, ratio: float, ends: Ends) -> dict[str, Any]:
        """Return N, D and the loss at a fixed number of tokens per parameter."""
        low, high = 0.0, 200.0

        def cost(log_n: float) -> float:
            n = np.exp(log_n)
            return float(evaluate(self.flops, {"N": n, "D": ratio * n}))

        for _ in range(100):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if cost(middle) > self.budget else (middle, high)
        n = np.array([math.exp(low)])
        value = by_differences(lambda theta: self.losses(theta, n, ratio * n)[:, 0])
        return {
            "ratio": ratio,
            "N": float(n[0]),
            "D": float(ratio * n[0]),
            "loss": self.natural(float(value(self.estimate.theta[None])[0][0])),
            "loss_interval": [self.natural(end) for end in interval(self.estimate, value, ends)],
        }


def text(items: list[dict[str, Any]]) -> str:
    """Return optima as lines for a terminal."""
    lines = []
    for item in items:
        values = []
        for name in ("N", "D", "loss"):
            if name in item:
                low, high = item[f"{name}_interval"]
                values.append(f"{name} {item[name]:.4g} [{low:.4g}, {high:.4g}]")
        note = "" if item["inside"] else f"; {NOT_INSIDE}" if "loss" in item else "; extrapolated"
        lines.append(f"  C {item['C']:.4g}: {', '.join(values)}, D/N {item['ratio']:.4g}{note}")
        if "at_ratio" in item:
            other = item["at_ratio"]
            low, high = other["loss_interval"]
            where = f"N {other['N']:.4g}, D {other['D']:.4g}"
            lines.append(f"    at D/N {other['ratio']:g}: {where}, loss {other['loss']:.6g} [{low:.6g}, {high:.6g}]")
    return "\n".join(lines)
