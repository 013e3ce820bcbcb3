"""Predictions at new points, with the uncertainty of the law and the scatter of single runs separately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.errors import InputError
from analysis.fits.fit import Fit
from analysis.fits.profile import Ends
from analysis.fits.quantities import interval, prediction


def predictions(estimate: Fit, ends: Ends, points: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return what the law predicts at each point.

    Args:
        estimate: The fit.
        ends: Profile intervals of its parameters.
        points: The inputs of each point.

    Returns:
        For each point its inputs, `predicted`, `interval` (95 %, of the law), `run_interval` (95 %, of a new run: with
        scatter), and `extrapolated`, the inputs outside the fitted ones.
    """
    return [_predicted(estimate, ends, point) for point in points]


def _predicted(estimate: Fit, ends: Ends, point: Mapping[str, float]) -> dict[str, Any]:
    law = estimate.problem.law
    missing = [name for name in law.inputs if name not in point]
    if missing:
        raise InputError(f"--at: {missing[0]} is missing; law {law.name} needs {', '.join(law.inputs)}")
    value = float(estimate.predict({name: np.array([point[name]]) for name in law.inputs})[0])
    if not math.isfinite(value):
        raise InputError(f"--at: law {law.name} gives no finite value at {dict(point)}")
    low, high = interval(estimate, prediction(estimate, point), ends)
    centre = math.log(value) if law.residuals == "log" else value
    spread = scatter(estimate)
    run = (centre - math.hypot(centre - low, spread), centre + math.hypot(high - centre, spread))
    outside = [name for name in law.inputs if not _within(estimate.problem.x[name], point[name])]
    return {
        "inputs": {name: float(point[name]) for name in law.inputs},
        "predicted": value,
        "interval": [_back(end, law.residuals) for end in (low, high)],
        "run_interval": [_back(end, law.residuals) for end in run],
        "extrapolated": outside,
    }


def scatter(estimate: Fit) -> float:
    """Return half the 95 % interval of a run about the law, on the fitted scale: a t-quantile of the residuals' spread.

    Under Huber's loss the spread is the normalised median absolute residual, which outliers do not widen.
    """
    from scipy.special import stdtrit

    free = max(estimate.problem.n - estimate.dimension, 1)
    if math.isinf(estimate.problem.delta):
        spread = math.sqrt(float((estimate.problem.w * estimate.residuals**2).sum()) / free)
    else:
        spread = 1.4826 * float(np.median(np.abs(estimate.residuals))) * math.sqrt(estimate.problem.n / free)
    return spread * float(stdtrit(free, 0.975))


def _within(values: np.ndarray, value: float) -> bool:
    return bool(values.min() * (1 - 1e-9) <= value <= values.max() * (1 + 1e-9))


def _back(end: float, residuals: str) -> float:
    """Return an end on the fitted scale in the outcome's own units."""
    if residuals == "linear":
        return end
    return math.exp(end) if end < 700 else math.inf


def text(items: Sequence[Mapping[str, Any]]) -> str:
    """Return predictions as lines for a terminal."""
    lines = []
    for item in items:
        where = ", ".join(f"{name} {value:.4g}" for name, value in item["inputs"].items())
        (low, high), (run_low, run_high) = item["interval"], item["run_interval"]
        note = f"; extrapolated in {', '.join(item['extrapolated'])}" if item["extrapolated"] else ""
        lines.append(
            f"  at {where}: {item['predicted']:.6g}, law [{low:.6g}, {high:.6g}], "
            f"new run [{run_low:.6g}, {run_high:.6g}]{note}"
        )
    return "\n".join(lines)
