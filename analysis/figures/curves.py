"""A fitted law against its first input: runs, curves and their 95 % bands at several values of the second."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.figures import style
from analysis.fits.fit import Fit
from analysis.fits.profile import Ends
from analysis.fits.quantities import intervals, predictions

CURVES = 6
POINTS = 80
KNOTS = 10
"""Number of points per curve at which its band is computed; it is interpolated between them."""


def curves_figure(estimate: Fit, ends: Ends, folder: Path, source: str) -> list[Path]:
    """Draw the outcome against the first input, one curve per value of the input that varies with it.

    Laws of one input have one curve. Of three or more inputs, the others are held at their medians, and each run is
    drawn at its own value, on the colour of the nearest curve.

    Args:
        estimate: The fit.
        ends: The profile intervals of its parameters, for the bands.
        folder: Where the figure is written.
        source: The table of the runs, for the caption.

    Returns:
        The files.
    """
    problem = estimate.problem
    law, x = problem.law, problem.x
    name, *others = law.inputs
    second = others[0] if others else None
    levels = _levels(x[second]) if second else np.array([np.nan])
    nearest = _nearest(x[second], levels) if second else np.zeros(problem.n, int)
    at = _range(x[name])
    curves = [
        {name: at}
        | {key: np.full(POINTS, float(np.median(x[key]))) for key in others}
        | ({second: np.full(POINTS, level)} if second else {})
        for level in levels
    ]
    bands = _bands(estimate, ends, curves)
    with style.figure(1, 1, width=5.2, height=3.8) as (drawn, (axis,)):
        from matplotlib import colormaps

        for rank, level in enumerate(levels):
            color = colormaps["viridis"](0.88 * rank / max(len(levels) - 1, 1))
            rows = nearest == rank
            predicted, low, high = bands[rank]
            label = f"{second} = {level:.3g}" if second else f"law and runs ({problem.n})"
            axis.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
            axis.plot(at, predicted, color=color, linewidth=1.1, label=label)
            axis.plot(x[name][rows], problem.y[rows], "o", color=color, markersize=3, markeredgewidth=0)
        if (x[name] > 0).all() and x[name].max() > 20 * x[name].min():
            style.log_axis(axis)
        if law.residuals == "log" and problem.y.max() > 5 * problem.y.min():
            axis.set_yscale("log")
        span = problem.y.max() - problem.y.min()
        if axis.get_yscale() == "linear":
            axis.set_ylim(problem.y.min() - 0.15 * span, problem.y.max() + 0.1 * span)
        axis.set_xlabel(f"{name}: {law.inputs[name]}" if law.inputs[name] != "input" else name)
        axis.set_ylabel(law.output)
        style.legend_above(drawn, [axis])
        return style.save(drawn, folder, f"curves-{law.name}", _note(estimate, others, source))


def _note(estimate: Fit, others: list[str], source: str) -> str:
    law = estimate.problem.law
    where = ""
    if others:
        where = f" Each curve at one value of {others[0]}; runs have the colour of the nearest."
    if len(others) > 1:
        where += f" Curves at the median of {', '.join(others[1:])}."
    bands = "bands: 95 % profile intervals of the law, without the scatter of runs"
    return f"{law.formula}; n = {estimate.problem.n}; {bands}.{where} {source}"


def _levels(values: np.ndarray) -> np.ndarray:
    """Return up to CURVES values of an input, spread over those that occur."""
    unique = np.unique(values)
    if len(unique) <= CURVES:
        return unique
    if (unique > 0).all():
        return np.exp(np.quantile(np.log(values), np.linspace(0.03, 0.97, CURVES)))
    return np.quantile(values, np.linspace(0.03, 0.97, CURVES))


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the curve nearest to each run, on a logarithmic scale where all values are positive."""
    if (values > 0).all() and (levels > 0).all():
        values, levels = np.log(values), np.log(levels)
    return np.abs(values[:, None] - levels).argmin(1)


def _range(values: np.ndarray) -> np.ndarray:
    """Return points over an input's range, evenly spaced on a logarithmic scale where it is positive."""
    if (values > 0).all():
        return np.geomspace(values.min(), values.max(), POINTS)
    return np.linspace(values.min(), values.max(), POINTS)


def _bands(
    estimate: Fit, ends: Ends, curves: list[dict[str, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the law along each curve and the ends of its 95 % band: profile intervals at KNOTS points per curve, whose
    distances from the law are interpolated."""
    knots = np.linspace(0, POINTS - 1, KNOTS).round().astype(int)
    points = {name: np.concatenate([curve[name][knots] for curve in curves]) for name in curves[0]}
    law = intervals(estimate, predictions(estimate, points), KNOTS * len(curves), ends).reshape(-1, KNOTS, 2)
    is_log = estimate.problem.law.residuals == "log"
    bands = []
    for curve, pairs in zip(curves, law, strict=True):
        predicted = estimate.predict(curve)
        with np.errstate(all="ignore"):
            centre = np.log(predicted) if is_log else predicted
            reach = np.nan_to_num(np.abs(pairs - centre[knots][:, None]), nan=0.0, posinf=300.0)
        low, high = (np.interp(np.arange(POINTS), knots, side) for side in reach.T)
        if is_log:
            bands.append((predicted, predicted * np.exp(-low), predicted * np.exp(high)))
        else:
            bands.append((predicted, predicted - low, predicted + high))
    return bands
