"""The outcome against the share of one sparse budget that is in tables instead of experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.destinations.sparse_share import Budget
from analysis.comparisons.paired import E50
from analysis.comparisons.statistics import MIN_PAIRS
from analysis.figures import style
from analysis.figures.context import Context, Missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPERTS = r"rho[=~](\d+)%"
"""How names of published models state the percentage of the sparse budget that is in experts (Engram's rho)."""


def sparse_share(context: Context, folder: Path) -> list[Path]:
    """Draw the outcome of every budget against the share in tables, next to published losses.

    Raises:
        Missing: No three variants divide a budget in different ways, or runs lack a metric.
    """
    with context.missing_if_refused():
        metric, budgets = context.comparisons.sparse_shares
    if not budgets:
        raise Missing(
            f"no three variants of grid {context.grid} have equal sparse parameters (within 2 %) and different shares "
            "of them in tables; add variants that divide those of one between experts and a table, as "
            f"grids/share.yaml does, then: suite sweep {context.source}"
        )
    if not any(division.gain.n for budget in budgets for division in budget.divisions[1:]):
        raise Missing(
            f"no variant of grid {context.grid} has a pair with that of the least share in which both have {metric}; "
            f"with more train.epochs they do: suite sweep {context.source}"
        )
    published = published_losses(context.data.published)
    panels = 1 if published.empty else 2
    with style.figure(1, panels, width=3.8 * panels, height=3.2) as (drawn, axes):
        for budget, line in zip(budgets, style.STYLES * len(budgets), strict=False):
            _draw(axes[0], budget, line, metric, context)
        axes[0].axhline(1.0 if metric == E50 else 0.0, color="#888888", linewidth=0.8, linestyle=":")
        outcome = "E50, ratio to that of" if metric == E50 else f"improvement of {metric} over"
        axes[0].set_ylabel(f"{outcome}\nthe least share")
        if panels == 2:
            _draw_published(axes[1], published)
        for axis in axes:
            axis.set_xlim(-5, 105)
            axis.set_xlabel("share of the sparse parameters in tables, %")
        style.legend_above(drawn, axes)
        note = (
            "Sparse: parameters that a token does not use; equal within 2 % along a line. Mean over pairs of one seed, "
            f"95 % t-intervals for {MIN_PAIRS}+ pairs. Parameters that a token uses differ; see the report's table."
        )
        if panels == 2:
            note += " Right: as the source prints them, one run each (A: two transcriptions or the text, B: one)."
        return style.save(drawn, folder, "sparse-share", context.note(note))


def _draw(axis: Axes, budget: Budget, line: str, metric: str, context: Context) -> None:
    """Draw one budget: a line over its variants, and a marker of its family for each."""
    own = [division for division in budget.divisions if division.gain.n]
    x = [100 * division.share for division in own]
    rows = np.array([(division.gain.mean, division.gain.low, division.gain.high) for division in own]).reshape(-1, 3)
    middle, ends = rows[:, 0], rows[:, 1:]
    if metric == E50:
        middle, ends = 2**-middle, 2**-ends
    axis.plot(x, middle, linestyle=line, color="#555555", label=budget.name)
    for at, y, (one, other), division in zip(x, middle, ends, own, strict=True):
        look = context.looks.get(context.drawn_as.get(division.label, ""), style.PLAIN)
        reach = None if np.isnan(one) else [[abs(y - min(one, other))], [abs(max(one, other) - y)]]
        marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "linestyle": "none", "capsize": 2.5}
        axis.errorbar([at], [y], yerr=reach, label=division.family, **marks)


def published_losses(published: pd.DataFrame | None) -> pd.DataFrame:
    """Return the published losses of models that divide one sparse budget, with the `share` in tables in percent."""
    if published is None:
        return pd.DataFrame()
    experts = published["family"].astype(str).str.extract(EXPERTS)[0].astype(float)
    named = published.assign(share=100 - experts)
    return named[experts.notna() & (named["metric"] == "loss")].sort_values("share")


def _draw_published(axis: Axes, published: pd.DataFrame) -> None:
    for source, group in published.groupby("source", observed=True):
        letters = ", ".join(sorted(set(group["confidence"].astype(str).str.partition(":")[0])))
        axis.plot(group["share"], group["value"], "x--", color="#777777", label=f"published: {source}, {letters}")
    axis.set_ylabel("published loss, nats per token")
