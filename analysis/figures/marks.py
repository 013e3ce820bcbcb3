"""Marks that several figures draw: means with intervals, lines over base sizes, points of variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import paired
from analysis.figures import style
from analysis.figures.context import Context

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = 50
"""Most single runs that are drawn next to their mean."""


def dot(
    axis: Axes,
    at: float,
    values: np.ndarray,
    look: style.Look,
    sideways: bool = False,
    ratio: bool = False,
    **options: Any,
) -> None:
    """Draw the mean of some runs with its 95 % t-interval, and single runs as faint ticks.

    Args:
        axis: Where.
        at: The place of the mean on the other axis.
        values: One per run.
        look: Colour and marker.
        sideways: Values lie along x.
        ratio: Mean and interval are those of the logarithms.
        options: Of the mean's marker.
    """
    difference = paired(np.log(values) if ratio else values)
    middle, low, high = ((np.exp(v) if ratio else v) for v in (difference.mean, difference.low, difference.high))
    reach = None if np.isnan(low) else [[middle - low], [high - middle]]
    marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "capsize": 2.5, "linestyle": "none"}
    ticks = values if len(values) <= TICKS else np.quantile(values, [0.0, 0.1, 0.5, 0.9, 1.0])
    if sideways:
        axis.plot(ticks, [at] * len(ticks), "|", color=look.color, alpha=0.4)
        axis.errorbar([middle], [at], xerr=reach, **(marks | options))
    else:
        axis.plot([at] * len(ticks), ticks, "_", color=look.color, alpha=0.4)
        axis.errorbar([at], [middle], yerr=reach, **(marks | options))


def face(look: style.Look, group: pd.DataFrame, key: str) -> str:
    """Return the marker's fill: white where the mean is of E50 and a run is censored, so that it is a bound.

    Args:
        look: The look of the variant.
        group: Its runs.
        key: Column of the outcome.
    """
    return "white" if key == "e50" and bool(group["e50_state"].ne("reached").any()) else look.color


def line_over_bases(axis: Axes, context: Context, label: str, part: pd.DataFrame, x: str, y: str) -> None:
    """Draw one variant over its base sizes: means joined, each with its interval and single runs.

    Args:
        axis: Where.
        context: Looks and legend entries.
        label: The variant.
        part: Its runs, with columns `x` and `y`.
        x: Column of the horizontal place.
        y: Column of the outcome.
    """
    look = context.looks[label]
    groups = sorted(((float(group[x].mean()), group) for _, group in part.groupby("base")), key=lambda item: item[0])
    axis.plot(
        [at for at, _ in groups],
        [group[y].mean() for _, group in groups],
        color=look.color,
        linestyle=look.linestyle,
        marker=look.marker,
        markersize=look.size,
        label=context.legend(label),
    )
    for at, group in groups:
        dot(axis, at, group[y].to_numpy(float), look, markerfacecolor=face(look, group, y), markersize=look.size)


def variant_points(axis: Axes, context: Context, part: pd.DataFrame, x: str, y: str) -> None:
    """Draw one point per variant, with what distinguishes it within its family written next to the point.

    Args:
        axis: Where.
        context: Looks and legend entries.
        part: Runs with columns `x` and `y`.
        x: Column of the horizontal place.
        y: Column of the outcome.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for label, group in part.groupby("label", sort=False):
        family, look, at = str(group["family"].iloc[0]), context.looks[str(label)], float(group[x].mean())
        marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": look.size}
        axis.plot([], [], label=context.legend(str(label)), linestyle="none", **marks)
        to_the_left = family == context.data.reference
        place: dict[str, Any] = {"xytext": (-6, -2), "ha": "right"} if to_the_left else {"xytext": (6, -2)}
        if np.isfinite(at):
            dot(axis, at, group[y].to_numpy(float), look, markersize=look.size)
            axis.annotate(
                str(label).removeprefix(family).strip(),
                (at, float(group[y].mean())),
                fontsize=6,
                color="#555555",
                textcoords="offset points",
                **place,
            )
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
