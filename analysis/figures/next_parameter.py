"""Where the next parameter goes: gain over the base against what each destination adds, one panel for each cost."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.comparisons.next_parameter import AXES, Step, metric_of, steps
from analysis.errors import InputError
from analysis.figures import style
from analysis.figures.context import Context, Missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = ("params", "held", "bytes", "macs", "time")


def next_parameter(context: Context, folder: Path) -> list[Path]:
    """Draw the gains of every base, a row each.

    Raises:
        Missing: No variant can be paired with its base.
    """
    try:
        metric = metric_of(context.data, None)
        found = steps(context.data, metric)
    except InputError as error:
        raise Missing(str(error)) from None
    if not found:
        raise Missing(f"no variant of grid {context.grid} has a plain {context.data.reference} run of the same seed")
    return draw(found, metric, context.note(""), folder)


def draw(found: list[Step], metric: str, source: str, folder: Path) -> list[Path]:
    """Draw steps.

    Args:
        found: As `steps` returns them.
        metric: What gains are measured in.
        source: Last sentences of the footnote.
        folder: Where the files are written.

    Returns:
        PNG, PDF and SVG.
    """
    names = list(dict.fromkeys(step.destination for step in found))
    looks = style.looks([(name.split(" ")[0], name) for name in names])
    bases = [(base, list(members)) for base, members in groupby(found, key=lambda step: step.base)]
    with style.figure(len(bases), len(PANELS), width=10.0, height=0.6 + 2.3 * len(bases), sharey="row") as (
        drawn,
        axes,
    ):
        for row, (base, members) in enumerate(bases):
            for column, by in enumerate(PANELS):
                axis = axes[row * len(PANELS) + column]
                for name in names:
                    _curve(axis, [step for step in members if step.destination == name], by, name, looks[name])
                axis.axhline(0, color="#888888", linewidth=0.8)
                style.log_axis(axis)
                axis.xaxis.set_major_formatter("{x:g}")
                if row == len(bases) - 1:
                    axis.set_xlabel(f"{AXES[by][1]},\ntimes the base")
            unit = "doublings of\nlearning speed" if metric == "e50" else f"improvement of\n{metric}"
            axes[row * len(PANELS)].set_ylabel(f"{base}: gain,\n{unit}")
        style.legend_above(drawn, axes)
        note = (
            "Gain over the plain model of the base: mean over pairs of runs of one seed, with 95 % t-intervals from 5 "
            "pairs on. Lines start at the base. Training time is that of the machine that ran the grid."
        )
        return style.save(drawn, folder, "next-parameter", " ".join(filter(None, [note, source])))


def _curve(axis: Axes, members: list[Step], by: str, name: str, look: style.Look) -> None:
    """Draw one destination, from the base on."""
    points = [(2 ** step.doublings[by], step.gain) for step in members if np.isfinite(step.doublings[by])]
    points.sort(key=lambda point: point[0])
    if not points:
        return
    x = np.array([1.0, *(ratio for ratio, _ in points)])
    y = np.array([0.0, *(gain.mean for _, gain in points)])
    reach = np.array([0.0, *(np.nan_to_num(gain.high - gain.mean) for _, gain in points)])
    axis.errorbar(
        x,
        y,
        yerr=reach,
        color=look.color,
        marker=look.marker,
        markersize=4,
        linestyle=look.linestyle,
        capsize=2,
        label=name,
        markevery=slice(1, None),
    )
