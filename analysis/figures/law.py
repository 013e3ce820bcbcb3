"""The picture of a fitted law: data and law, residuals, leverage, and the held-out points as they were predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures import style
from analysis.fits.fit import Fit
from analysis.fits.intervals import HeldOut, leverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FITTED = style.COLOURS["memory_plus"]
HELD = "#D55E00"


def law_figure(estimate: Fit, held: HeldOut, folder: Path, source: str) -> list[Path]:
    """Draw fitted against observed (against its one input, for laws of one), with residuals and leverage below.

    Held-out points are open, as a fit to the rest predicted them; the law drawn is fitted to all.

    Args:
        estimate: The fit to all points.
        held: The held-out points and their predictions.
        folder: Where the files are written.
        source: The source in the footnote.
    """
    problem = estimate.problem
    law, y = problem.law, problem.y
    single = len(law.inputs) == 1
    name = next(iter(law.inputs))
    x = problem.x[name] if single else y
    heights = {"height_ratios": [3, 1.4, 1.2]}
    with style.figure(3, 1, width=5.2, height=6.4, sharex=True, gridspec_kw=heights) as (drawn, (top, middle, bottom)):
        fitted = np.ones(problem.n, bool)
        fitted[held.rows] = False
        if single:
            _curve(top, estimate, name)
        else:
            top.plot([y.min(), y.max()], [y.min(), y.max()], color="#888888", linewidth=0.8, linestyle=":")
        shown = y if single else estimate.predict(problem.x)
        top.plot(x[fitted], shown[fitted], "o", color=FITTED, markersize=3.5, label=f"fitted ({int(fitted.sum())})")
        if len(held.rows):
            guess = y[held.rows] if single else held.predicted
            words = f"held out{'' if single else ', as predicted before the fit'} ({len(held.rows)})"
            top.plot(x[held.rows], guess, "o", color=HELD, markerfacecolor="none", markersize=6, label=words)
        _residuals(middle, estimate, held, x)
        bottom.plot(x, leverage(estimate), "o", color=FITTED, markersize=3.5)
        bottom.set_ylim(bottom=0)
        top.set_ylabel(law.output if single else f"{law.output}, fitted")
        bottom.set_ylabel("leverage")
        bottom.set_xlabel(f"{name}: {law.inputs[name]}" if single else f"{law.output}, observed")
        positive = x[x > 0]
        if single and len(positive) and (x >= 0).all() and x.max() / positive.min() > 20:
            if len(positive) == len(x):
                style.log_axis(bottom)
            else:
                bottom.set_xscale("symlog", linthresh=float(positive.min()))
                bottom.set_xlim(-positive.min() / 2, 2 * positive.max())
        top.legend(loc="best")
        drawn.align_ylabels()
        return style.save(drawn, folder, f"fit-{law.name}", _note(estimate, held, source))


def _note(estimate: Fit, held: HeldOut, source: str) -> str:
    """Describe the law, what was held out and how it was predicted, and where the points are from."""
    score = f"nothing held out: {held.reason}"
    if len(held.rows):
        error = 100 * float(np.abs(held.relative_errors).mean())
        score = f"held out: {held.rule}, mean |relative error| {error:.3g} %, from a fit to the rest"
    shares = f"leverage sums to the {len(estimate.problem.free)} parameters fitted"
    law = estimate.problem.law
    return f"{law.formula}; n = {estimate.problem.n}, no intervals on single points; {score}; {shares}. {source}"


def _residuals(axis: Axes, estimate: Fit, held: HeldOut, x: np.ndarray) -> None:
    """Draw law minus data on the scale that was fitted, of the fit to all, and of the held-out points as predicted."""
    logs = estimate.problem.law.residuals == "log"
    scale = 100.0 if logs else 1.0
    axis.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
    axis.plot(x, scale * estimate.residuals, "o", color=FITTED, markersize=3.5)
    if len(held.rows):
        error = np.log(held.predicted / held.observed) if logs else held.predicted - held.observed
        axis.plot(x[held.rows], scale * error, "o", color=HELD, markerfacecolor="none", markersize=6)
    axis.set_ylabel("law − data, %" if logs else "law − data")


def _curve(axis: Axes, estimate: Fit, name: str) -> None:
    """Draw the law over the range of its one input."""
    values = estimate.problem.x[name]
    positive = values[values > 0]
    at = (
        np.concatenate([values[values == 0][:1], np.geomspace(positive.min(), positive.max(), 200)])
        if len(positive)
        else np.linspace(values.min(), values.max(), 200)
    )
    axis.plot(at, estimate.predict({name: at}), color="#000000", linewidth=1.2, label="law")
