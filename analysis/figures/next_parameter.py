"""Where the next parameter goes: gains against each cost, the wider reference of equal gain, and equal time."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.destinations.next_parameter import AXES, Step, equivalent_size
from analysis.comparisons.statistics import Difference
from analysis.comparisons.steadiness import why_not_compared
from analysis.figures import style
from analysis.figures.context import SIDE_BY_SIDE, Context, Missing
from analysis.figures.marks import dot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.records.grid_data import GridData


def next_parameter(context: Context, folder: Path) -> list[Path]:
    """Draw the gains of every base, a row each.

    Raises:
        Missing: No variant can be paired with its base.
    """
    with context.missing_if_refused():
        metric, steps = context.comparisons.steps
    if not steps:
        raise Missing(
            f"grid {context.grid} has no variant next to a plain {context.data.reference} model of the same base, "
            f"data and seed; add one, then: suite sweep {context.source}"
        )
    if not any(step.gains for step in steps):
        raise Missing(
            f"no variant of grid {context.grid} has a pair with {context.data.reference} in which both have "
            f"{metric}; with more train.epochs they do: suite sweep {context.source}"
        )
    return draw(context.data, steps, metric, context.note(""), folder)


def draw(data: GridData, steps: list[Step], metric: str, source: str, folder: Path) -> list[Path]:
    """Draw steps, a panel per cost; that of training time only if the machine was steady.

    Args:
        data: The records.
        steps: As `steps` returns them.
        metric: What gains are measured in.
        source: Last sentences of the footnote.
        folder: Where the files are written.

    Returns:
        PNG, PDF and SVG.
    """
    names = sorted(dict.fromkeys(step.destination for step in steps), key=_is_control)
    looks = style.looks([(name.split(" ")[0], name) for name in names])
    bases = [(base, list(members)) for base, members in groupby(steps, key=lambda step: step.base)]
    unsteady = why_not_compared(data)
    panels = [by for by in AXES if by != "time" or unsteady is None]
    with style.figure(len(bases), len(panels), width=11.5, height=0.6 + 2.3 * len(bases), sharey="row") as (
        drawn,
        axes,
    ):
        for row, (base, members) in enumerate(bases):
            for column, by in enumerate(panels):
                axis = axes[row * len(panels) + column]
                for name in names:
                    _curve(axis, [step for step in members if step.destination == name], by, name, looks[name])
                axis.axhline(0, color="#888888", linewidth=0.8)
                style.log_axis(axis)
                axis.xaxis.set_major_formatter("{x:g}")
                if row == len(bases) - 1:
                    axis.set_xlabel("\n".join(wrap(f"{AXES[by][1]}, times the base", 20)))
            unit = "doublings of\nlearning speed" if metric == "e50" else f"improvement of\n{metric}"
            axes[row * len(panels)].set_ylabel(f"{base}: gain,\n{unit}")
        style.legend_above(drawn, axes)
        note = (
            "Gain over the plain model of the base: mean over pairs of runs of one seed, with 95 % t-intervals where "
            "there are 5 or more pairs. Lines start at the base; hollow: controls of a table."
        )
        time = f"No panel of training time: {unsteady}" if unsteady else "Training time is of the machine of the runs."
        return style.save(drawn, folder, "next-parameter", " ".join(filter(None, [note, time, source])))


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
        fillstyle="none" if _is_control(name) else "full",
        linestyle=look.linestyle,
        capsize=2,
        label=name,
        markevery=slice(1, None),
    )


def _is_control(destination: str) -> bool:
    return " control=" in destination


def against_size(context: Context, folder: Path) -> list[Path]:
    """Draw N_eq, the parameters of a wider reference model of equal gain, against the parameters of each variant.

    Raises:
        Missing: No base has a wider reference model, or no gain lies on the curve of those that it has.
    """
    reference = context.data.reference
    with context.missing_if_refused():
        _, steps = context.comparisons.steps
    points: list[tuple[str, str, float, Difference]] = []
    for base, group in groupby(steps, key=lambda step: step.base):
        members = list(group)
        sizes = equivalent_size(members, reference)
        own = {step.label: step.doublings["params"] for step in members}
        points += [(base, label, own[label], size) for label, size in sizes.items()]
    if not points:
        raise Missing(
            f"no variant of grid {context.grid} gains as much as some wider {reference} model of its base; "
            f"add {reference} with a larger model.ffn_hidden, then: suite sweep {context.source}"
        )
    looks = style.looks([(label.split(" ")[0], label) for _, label, _, _ in points])
    with style.figure(1, 1, width=4.6, height=3.4) as (drawn, (axis,)):
        for base, label, doublings, size in points:
            look, middle = looks[label], 2**size.mean
            reach = None if np.isnan(size.low) else [[middle - 2**size.low], [2**size.high - middle]]
            marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "linestyle": "none", "capsize": 2}
            axis.errorbar([2**doublings], [middle], yerr=reach, label=f"{label}, {base} (n={size.n})", **marks)
        ends = np.array(axis.get_xlim())
        axis.plot(ends, ends, color="#888888", linewidth=0.8, label=f"as good as {reference} of its size")
        axis.set_yscale("log")
        style.log_axis(axis)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
        axis.set_xlabel("parameters, times the base")
        axis.set_ylabel(f"N_eq: parameters of {reference}\nof equal gain, times the base")
        style.legend_above(drawn, [axis])
        note = "N_eq per seed, mean of its logarithm, 95 % t-intervals for 5+ pairs."
        return style.save(drawn, folder, "equivalent-size", context.note(note))


def at_equal_time(context: Context, folder: Path) -> list[Path]:
    """Draw the loss of every variant at the last wall-clock time that all runs of its base reached, a panel per base.

    Raises:
        Missing: No run has evaluation-mode losses during training.
    """
    curves = context.data.curves("eval_loss", "wall_s")
    table = context.table[curves.count[context.table.index.to_numpy(int)] > 1]
    if table.empty:
        raise Missing(
            f"no run of grid {context.grid} has losses during training; they come with train.probes > 0: "
            f"suite sweep {context.source}"
        )
    ends = pd.Series(curves.last_x()[table.index.to_numpy(int)], index=table.index)
    time = ends.groupby(table["base"]).transform("min")
    table = table.assign(at_time=curves.at(time.to_numpy(float), table.index.to_numpy(int), log=False), time=time)
    bases = [base for base in context.bases if base in set(table["base"])]
    rows = max(table.loc[table["base"] == base, "label"].nunique() for base in bases)
    height = 1.2 + rows * style.row_height(style.row_names([context.legend(label) for label in context.looks]))
    with style.figure(1, len(bases), width=3.6 * len(bases) + 0.6, height=height) as (drawn, axes):
        for axis, base in zip(axes, bases, strict=True):
            part = table[table["base"] == base]
            groups = list(part.groupby("label", sort=False))[::-1]
            for row, (label, group) in enumerate(groups):
                dot(axis, row, group["at_time"].to_numpy(float), context.looks[str(label)], sideways=True)
            names = style.row_names([f"{label} (n={len(group)})" for label, group in groups])
            axis.set_yticks(range(len(groups)), names)
            axis.set_xlabel(f"{base}: loss after {part['time'].iloc[0]:,.3g} s of training, nats")
        note = f"{SIDE_BY_SIDE} Seconds of the machine that ran the grid, where runs shared it."
        return style.save(drawn, folder, "equal-time", context.speed_note(note))
