"""Predictions at new points, with the uncertainty of the law and the scatter of single runs separately."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.errors import InputError
from analysis.fits import quantities
from analysis.fits.fit import Fit
from analysis.fits.profile import Ends


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
    for point in points:
        missing = [name for name in estimate.problem.law.inputs if name not in point]
        if missing:
            law = estimate.problem.law
            raise InputError(f"--at: {missing[0]} is missing; law {law.name} needs {', '.join(law.inputs)}")
    x = {name: np.array([float(point[name]) for point in points]) for name in estimate.problem.law.inputs}
    values = estimate.predict(x)
    for point, value in zip(points, values, strict=True):
        if not math.isfinite(value):
            raise InputError(f"--at: law {estimate.problem.law.name} gives no finite value at {dict(point)}")
    laws = quantities.intervals(estimate, quantities.predictions(estimate, x), len(points), ends)
    return [
        _predicted(estimate, {name: float(x[name][i]) for name in x}, float(values[i]), (float(low), float(high)))
        for i, (low, high) in enumerate(laws)
    ]


def _predicted(estimate: Fit, point: Mapping[str, float], value: float, ends: tuple[float, float]) -> dict[str, Any]:
    """Return the document of one point from the law's value there, and its interval on the fitted scale."""
    law, (low, high) = estimate.problem.law, ends
    centre = math.log(value) if law.residuals == "log" else value
    spread = scatter(estimate)
    run = (centre - math.hypot(centre - low, spread), centre + math.hypot(high - centre, spread))
    return {
        "inputs": dict(point),
        "predicted": value,
        "interval": [_back(end, law.residuals) for end in ends],
        "run_interval": [_back(end, law.residuals) for end in run],
        "extrapolated": [name for name in law.inputs if not _within(estimate.problem.x[name], point[name])],
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
