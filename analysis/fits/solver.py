"""Minimising a robust objective for many weightings of the same points at once.

The objective of fit b is sum over points of w_bn rho(r_bn), rho Huber's loss (r^2/2 up to delta, linear beyond;
delta infinite: least squares). Steps solve (H + lambda G) s = -gradient, with H the Gauss-Newton matrix of the points
in the quadratic zone and G that of Huber's weights: lambda to 0 is Newton's step on the active set, lambda near 1 the
monotone reweighted step. Both are unchanged by linear changes of parameters. Parameters stay inside a box: each step
minimises its quadratic model within the box by fixing the parameters that would leave it, one set after another, so
that a parameter at its bound, or on its way to infinity, holds back no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Residual = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta (B, p) -> residuals (B, n) and their derivatives (B, n, p)."""

POINTS_AT_ONCE = 60_000
"""Fits times points that are held in memory together."""


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """Return Huber's loss, r^2/2 for |r| <= delta and delta (|r| - delta/2) beyond."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size**2
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(residuals: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    """Return the weighted sum over points; infinite where a residual is not a number.

    Args:
        residuals: Law minus data, (B, n).
        weights: Weights of the points, (n,) or (B, n).
        delta: Delta of Huber's loss; infinite: least squares.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = (weights * huber(residuals, delta)).sum(-1)
    return np.where(np.isfinite(total), total, np.inf)


@dataclass(frozen=True)
class Box:
    """Bounds of theta, (p,) each, and the longest step of each parameter in one iteration."""

    low: np.ndarray
    high: np.ndarray
    reach: np.ndarray


def minimise(
    residual: Residual,
    theta: np.ndarray,
    weights: np.ndarray,
    delta: float,
    box: Box,
    free: np.ndarray | None = None,
    iterations: int = 200,
    smooth: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the objective of many fits at once.

    Args:
        residual: Residuals and derivatives of a batch of theta.
        theta: Starts, (B, p).
        weights: Weights of the points, (B, n).
        delta: Where Huber's loss becomes linear; infinite for least squares.
        box: Bounds of theta.
        free: Mask (B, p) of the parameters to move; all by default.
        iterations: The most steps of a fit.
        smooth: With a small delta, minimise a smoothed loss first (delta at the residuals' size) and sharpen it.

    Returns:
        theta (B, p) and the objective (B,).
    """
    descend = _sharpen if smooth and np.isfinite(delta) else _descend
    parts = []
    chunk = max(8, POINTS_AT_ONCE // weights.shape[1])
    for start in range(0, len(theta), chunk):
        part = slice(start, start + chunk)
        mask = np.ones_like(theta[part], bool) if free is None else free[part]
        inside = np.clip(theta[part], box.low, box.high)
        parts.append(descend(residual, inside, weights[part], delta, box, mask, iterations))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _sharpen(
    residual: Residual,
    theta: np.ndarray,
    weights: np.ndarray,
    delta: float,
    box: Box,
    free: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise at a falling series of deltas that ends at the requested one, and retain the best point under it."""
    first, _ = residual(theta)
    sizes = np.abs(first[np.isfinite(first)])
    width = 3.0 * float(np.median(sizes)) if sizes.size else delta
    best_theta, best = theta, objective(first, weights, delta)
    while width > 2 * delta:
        theta, _ = _descend(residual, theta, weights, width, box, free, 15)
        width /= 4
    theta, values = _descend(residual, theta, weights, delta, box, free, iterations)
    better = values <= best
    return np.where(better[:, None], theta, best_theta), np.where(better, values, best)


def _descend(
    residual: Residual,
    theta: np.ndarray,
    weights: np.ndarray,
    delta: float,
    box: Box,
    free: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Take damped steps for every fit until none improves."""
    theta = theta.copy()
    with np.errstate(all="ignore"):
        r, jacobian = residual(theta)
        best = objective(r, weights, delta)
        damping = np.full(len(theta), 1e-2)
        active = np.flatnonzero(np.isfinite(best))
        stalls = np.zeros(len(theta), int)
        for _ in range(iterations):
            if len(active) == 0:
                break
            room = (
                np.maximum(box.low - theta[active], -box.reach),
                np.minimum(box.high - theta[active], box.reach),
            )
            step, expected = _step(
                r[active], jacobian[active], weights[active], delta, damping[active], free[active], room
            )
            trial = np.clip(theta[active] + step, box.low, box.high)
            trial_r, trial_jacobian = residual(trial)
            value = objective(trial_r, weights[active], delta)
            better = value < best[active]
            gain = np.where(better, best[active] - value, 0.0)
            rows = active[better]
            theta[rows], r[rows], jacobian[rows] = trial[better], trial_r[better], trial_jacobian[better]
            small = gain <= 1e-13 * np.maximum(best[active], 1e-300)
            best[rows] = value[better]
            damping[active] = np.where(better, damping[active] / 5, damping[active] * 6).clip(1e-10, 1e10)
            stalls[active] = np.where(better & small, stalls[active] + 1, 0)
            done = (damping[active] >= 1e9) | (stalls[active] >= 3) | (expected <= 1e-14 * best[active])
            active = active[~done]
    return theta, best


def _step(
    r: np.ndarray,
    jacobian: np.ndarray,
    weights: np.ndarray,
    delta: float,
    damping: np.ndarray,
    free: np.ndarray,
    room: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the damped step of every fit within `room` (lowest and highest step, (B, p) each), and its expected
    decrease."""
    jacobian = np.where(free[:, None, :], np.nan_to_num(jacobian, posinf=0, neginf=0), 0.0)
    size = np.abs(r)
    flat = jacobian.transpose(0, 2, 1)
    gradient = (flat @ (weights * np.clip(r, -delta, delta))[:, :, None])[:, :, 0]
    inside = flat @ (jacobian * (weights * (size <= delta))[:, :, None])
    majorant = inside if np.isinf(delta) else flat @ (jacobian * (weights * np.minimum(1, delta / size))[:, :, None])
    scale = np.einsum("bpp->bp", majorant)
    floor = np.maximum(scale, 1e-300) * 1e-12 + (scale <= 0)
    matrix = inside + damping[:, None, None] * (majorant + _diagonal(scale * 1e-3)) + _diagonal(floor)
    return _best_step(matrix, gradient, *room)


def _best_step(
    matrix: np.ndarray, gradient: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of three steps within low and high for the quadratic model, and its expected decrease.

    Fixing what leaves the range can end at a worse point than the start, where two nearly collinear parameters leave it
    together. A second step first fixes what the gradient alone drives out of the range; a third follows the scaled
    gradient, and decreases the model wherever any step does (its matrix is at most p times its diagonal).
    """
    p = gradient.shape[1]
    cautious = np.clip(-gradient / (p * np.einsum("bpp->bp", matrix)), low, high)
    step = _bounded_newton(matrix, gradient, low, high, np.zeros_like(cautious), np.zeros(cautious.shape, bool))
    best = _decrease(matrix, gradient, step)
    driven = ((cautious <= low) | (cautious >= high)) & (gradient != 0)
    rows = np.flatnonzero(driven.any(1))
    if len(rows):
        other = cautious.copy()
        other[rows] = _bounded_newton(matrix[rows], gradient[rows], low[rows], high[rows], cautious[rows], driven[rows])
        step, best = _better(matrix, gradient, step, best, other)
    return _better(matrix, gradient, step, best, cautious)


def _better(
    matrix: np.ndarray, gradient: np.ndarray, step: np.ndarray, best: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the better of two steps for each row, and its decrease of the model."""
    decrease = _decrease(matrix, gradient, other)
    return np.where((decrease > best)[:, None], other, step), np.maximum(decrease, best)


def _decrease(matrix: np.ndarray, gradient: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return by how much a step decreases the quadratic model, (B,)."""
    return np.asarray(-((gradient + 0.5 * (matrix @ step[:, :, None])[:, :, 0]) * step).sum(1))


def _bounded_newton(
    matrix: np.ndarray,
    gradient: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    step: np.ndarray,
    fixed: np.ndarray,
) -> np.ndarray:
    """Minimise gradient . s + s . matrix s / 2 over low <= s <= high, (B, p), with the `fixed` coordinates of `step`.

    Coordinates that leave their range are fixed at its end and the others are solved for again, until none leaves.
    """
    batch, p = gradient.shape
    step, fixed = step.copy(), fixed.copy()
    rows = np.arange(batch)
    for _ in range(p):
        held = np.where(fixed[rows], step[rows], 0.0)
        right = gradient[rows] + (matrix[rows] @ held[:, :, None])[:, :, 0]
        solved = np.where(fixed[rows], held, _solved(matrix[rows], right, ~fixed[rows]))
        out = ~fixed[rows] & ((solved < low[rows]) | (solved > high[rows]))
        step[rows] = np.clip(solved, low[rows], high[rows])
        fixed[rows] |= out
        rows = rows[out.any(1)]
        if not len(rows):
            break
    return step


def _solved(matrix: np.ndarray, gradient: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return the Newton step of the free coordinates, 0 for the others."""
    unit = free / np.sqrt(np.einsum("bpp->bp", matrix))
    scaled = matrix * unit[:, :, None] * unit[:, None, :] + _diagonal(np.where(free, 1e-14, 1.0))
    try:
        solved = np.linalg.solve(scaled, (gradient * unit)[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        solved = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(scaled, gradient * unit, strict=True)])
    return -np.nan_to_num(solved * unit)


def _diagonal(values: np.ndarray) -> np.ndarray:
    return values[:, :, None] * np.eye(values.shape[1])
