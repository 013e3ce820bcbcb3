"""The picture of a fitted law: data and law, residuals, and the held-out points as they were predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import style
from analysis.fit import Fit
from analysis.uncertainty import HeldOut

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELD = "#D55E00"


def law_figure(found: Fit, held: HeldOut, folder: Path, source: str) -> list[Path]:
    """Fitted against observed (against its one input, for laws of one), residuals below; held-out points open."""
    problem = found.problem
    law, y = problem.law, problem.y
    fitted = found.predict(problem.x)
    single = len(law.inputs) == 1
    name = next(iter(law.inputs))
    x = problem.x[name] if single else y
    with style.figure(2, 1, width=5.2, height=5.6, sharex=True, gridspec_kw={"height_ratios": [2, 1]}) as (drawn, axes):
        top, bottom = axes
        kept = np.ones(problem.n, bool)
        kept[held.rows] = False
        if single:
            _curve(top, found, name)
        else:
            top.plot([y.min(), y.max()], [y.min(), y.max()], color="#888888", linewidth=0.8, linestyle=":")
        shown = y if single else fitted
        top.plot(
            x[kept],
            shown[kept],
            "o",
            color=style.COLOURS["memory_plus"],
            markersize=3.5,
            label=f"fitted ({int(kept.sum())})",
        )
        if len(held.rows):
            guess = y[held.rows] if single else held.predicted
            words = (
                f"held out, as predicted before the fit ({len(held.rows)})"
                if not single
                else f"held out ({len(held.rows)})"
            )
            top.plot(x[held.rows], guess, "o", color=HELD, markerfacecolor="none", markersize=6, label=words)
        logs = law.residuals == "log"
        scale = 100.0 if logs else 1.0
        bottom.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
        bottom.plot(x, scale * found.residuals, "o", color=style.COLOURS["memory_plus"], markersize=3.5)
        if len(held.rows):
            error = np.log(held.predicted / held.observed) if logs else held.predicted - held.observed
            bottom.plot(x[held.rows], scale * error, "o", color=HELD, markerfacecolor="none", markersize=6)
        top.set_ylabel(law.output if single else f"{law.output}, fitted")
        bottom.set_ylabel("law − data, %" if logs else "law − data")
        bottom.set_xlabel(f"{name}: {law.inputs[name]}" if single else f"{law.output}, observed")
        if single and (x > 0).all() and x.max() / x.min() > 20:
            style.log_axis(bottom)
        top.legend(loc="best")
        note = f"{law.formula}; n = {problem.n}, no intervals on single points. {source}"
        return style.save(drawn, folder, f"fit-{law.name}", note)


def _curve(axis: Axes, found: Fit, name: str) -> None:
    """The law over the range of its one input."""
    values = found.problem.x[name]
    positive = values[values > 0]
    at = (
        np.geomspace(positive.min(), positive.max(), 200)
        if len(positive)
        else np.linspace(values.min(), values.max(), 200)
    )
    axis.plot(at, found.predict({name: at}), color="#000000", linewidth=1.2, label="law")
