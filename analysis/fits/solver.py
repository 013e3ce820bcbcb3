"""Minimising a robust objective for many weightings of the same points at once.

The objective of fit b is sum over points of w_bn rho(r_bn), rho Huber's loss (r^2/2 up to delta, linear beyond;
delta infinite: least squares). Steps solve (H + lambda G) s = -gradient, with H the Gauss-Newton matrix of the points
in the quadratic zone and G that of Huber's weights: lambda to 0 is Newton's step on the active set, lambda near 1 the
monotone reweighted step. Both are unchanged by linear changes of parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Residual = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""theta (B, p) -> residuals (B, n) and their derivatives (B, n, p)."""

LARGEST_STEP = 3.0
POINTS_AT_ONCE = 60_000
"""Fits times points that are held in memory together."""


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """Huber's loss, r^2/2 for |r| <= delta and delta (|r| - delta/2) beyond."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size**2
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(residuals: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    """Weighted sum over points; infinite where a residual is not a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = (weights * huber(residuals, delta)).sum(-1)
    return np.where(np.isfinite(total), total, np.inf)


def minimise(
    residual: Residual,
    theta: np.ndarray,
    weights: np.ndarray,
    delta: float,
    free: np.ndarray | None = None,
    iterations: int = 200,
    smooth: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise from theta (B, p) under weights (B, n); `free` (B, p) masks parameters held fixed.

    With `smooth` and a small delta the loss is first smoothed (delta at the residuals' size) and then sharpened step
    by step. Returns theta and the objective (B,).
    """
    way = _sharpen if smooth and np.isfinite(delta) else _descend
    parts = []
    chunk = max(8, POINTS_AT_ONCE // weights.shape[1])
    for start in range(0, len(theta), chunk):
        part = slice(start, start + chunk)
        mask = np.ones_like(theta[part], bool) if free is None else free[part]
        parts.append(way(residual, theta[part], weights[part], delta, mask, iterations))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _sharpen(
    residual: Residual, theta: np.ndarray, weights: np.ndarray, delta: float, free: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise at a falling series of deltas that ends at the one asked for, keeping the best point for that one."""
    first, _ = residual(theta)
    sizes = np.abs(first[np.isfinite(first)])
    width = 3.0 * float(np.median(sizes)) if sizes.size else delta
    best_theta, best = theta, objective(first, weights, delta)
    while width > 2 * delta:
        theta, _ = _descend(residual, theta, weights, width, free, 15)
        width /= 4
    theta, found = _descend(residual, theta, weights, delta, free, iterations)
    better = found <= best
    return np.where(better[:, None], theta, best_theta), np.where(better, found, best)


def _descend(
    residual: Residual, theta: np.ndarray, weights: np.ndarray, delta: float, free: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Damped steps for every fit until none improves."""
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
            step, expected = _step(r[active], jacobian[active], weights[active], delta, damping[active], free[active])
            trial = theta[active] + _shortened(step, theta[active])
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
    r: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, delta: float, damping: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The damped step of every fit and the decrease it expects."""
    jacobian = np.where(free[:, None, :], np.nan_to_num(jacobian, posinf=0, neginf=0), 0.0)
    size = np.abs(r)
    flat = jacobian.transpose(0, 2, 1)
    gradient = (flat @ (weights * np.clip(r, -delta, delta))[:, :, None])[:, :, 0]
    inside = flat @ (jacobian * (weights * (size <= delta))[:, :, None])
    majorant = inside if np.isinf(delta) else flat @ (jacobian * (weights * np.minimum(1, delta / size))[:, :, None])
    scale = np.einsum("bpp->bp", majorant)
    floor = np.maximum(scale, 1e-300) * 1e-12 + (scale <= 0)
    matrix = inside + damping[:, None, None] * (majorant + _diagonal(scale * 1e-3)) + _diagonal(floor)
    unit = 1 / np.sqrt(np.einsum("bpp->bp", matrix))
    scaled = matrix * unit[:, :, None] * unit[:, None, :] + 1e-14 * np.eye(matrix.shape[-1])
    try:
        solved = np.linalg.solve(scaled, (gradient * unit)[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        solved = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(scaled, gradient * unit, strict=True)])
    step = -np.nan_to_num(solved * unit)
    return step, -0.5 * (gradient * step).sum(1)


def _shortened(step: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The step, no longer than LARGEST_STEP in any parameter, or a share of the parameter where that is large."""
    reach = LARGEST_STEP * np.maximum(1.0, np.abs(theta) / 10)
    return step / np.maximum(1.0, (np.abs(step) / reach).max(1, keepdims=True))


def _diagonal(values: np.ndarray) -> np.ndarray:
    return values[:, :, None] * np.eye(values.shape[1])
