"""The figures of learning: curves against exposures, FLOPs, wall-clock and tokens; E50 and NLL against memory rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import MIN_PAIRS, paired, paired_by_group
from analysis.figures import style
from analysis.figures.context import Context, Missing
from analysis.figures.marks import dot, face
from analysis.records.grid_data import GridData
from analysis.records.runs.curves import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "epoch": "exposures of every fact",
    "train_flops": "training FLOPs",
    "wall_s": "wall-clock of training, seconds",
    "tokens": "training tokens",
}
LINES = 20
"""Most runs of a variant that are drawn as lines; more are drawn as a band."""
QUANTILES = (0.1, 0.9)


def mean_curve(data: GridData, runs: np.ndarray, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the curves of some runs on the probe exposures of the one that ended first.

    Args:
        data: The grid.
        runs: Positions of the runs.
        x: Probe column of the horizontal axis.
        y: Probe column of the outcome.

    Returns:
        The mean of x, (exposures,), and y of each run, (runs with such probes, exposures).
    """
    over_x, over_y = data.curves(x), data.curves(y)
    runs = runs[(over_x.count[runs] > 0) & (over_y.count[runs] > 0)]
    if not len(runs):
        return np.array([]), np.empty((0, 0))
    ends = over_y.last_x()[runs]
    shortest = runs[int(ends.argmin())]
    points = slice(over_y.first[shortest], over_y.first[shortest] + over_y.count[shortest])
    exposures = over_y.x[points]
    exposures = exposures[exposures > 0]
    return _resampled(over_x, runs, exposures).mean(0), _resampled(over_y, runs, exposures)


def _resampled(curves: Curves, runs: np.ndarray, exposures: np.ndarray) -> np.ndarray:
    """Return each run's values at these exposures, (runs, exposures)."""
    queries = np.repeat(runs, len(exposures))
    return curves.at(np.tile(exposures, len(runs)), queries, clamp=True).reshape(len(runs), len(exposures))


def curves(axis: Axes, context: Context, base: str, x: str, y: str) -> None:
    """Draw the mean curve of every variant of a base with its 95 % band, and each run as a thin line.

    Of more than LINES runs the band holds the runs between QUANTILES, and there are no thin lines.

    Args:
        axis: Where.
        context: The grid.
        base: Base size.
        x: Probe column of the horizontal axis, a key of AXES.
        y: Probe column of the outcome.
    """
    for label, group in context.variants(base):
        look, runs = context.looks[label], group.index.to_numpy(int)
        at, values = mean_curve(context.data, runs, x, y)
        if not values.size:
            continue
        if len(values) <= LINES:
            _single_runs(axis, context.data, runs, x, y, look)
        axis.plot(
            at,
            values.mean(0),
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            alpha=look.alpha,
            markersize=look.size,
            label=context.legend(label),
        )
        low, high = _band(values)
        axis.fill_between(at, low, high, color=look.color, alpha=0.15, linewidth=0)
    axis.set_xlabel(AXES[x])
    axis.set_title(f"base {base}", loc="left")


def _single_runs(axis: Axes, data: GridData, runs: np.ndarray, x: str, y: str, look: style.Look) -> None:
    if x not in data.probes or y not in data.probes:
        return
    points = data.probes[data.probes["run"].isin(runs)].dropna(subset=[x, y])
    for _, run in points.groupby("run"):
        axis.plot(run[x], run[y], color=look.color, alpha=0.18, linewidth=0.6)


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the band over (runs, exposures): quantiles of many runs, or the t-interval of the mean (NaN
    for few)."""
    if len(values) > LINES:
        low, high = np.quantile(values, QUANTILES, axis=0)
        return low, high
    places = np.tile(np.arange(values.shape[1]), len(values))
    intervals = paired_by_group(values.ravel(), places, values.shape[1])
    return np.array([one.low for one in intervals]), np.array([one.high for one in intervals])


CURVE_NOTE = (
    "Thick: mean over seeds as far as all of them ran (runs stop once past half of N H); band: 95 % t-interval, drawn "
    f"for {MIN_PAIRS}+ runs, or, of more than {LINES} runs, the middle 80 % of them; thin: single runs; n: number "
    "of runs, a/b by base."
)


CUT_NOTE = " Cut off below −¼ N H, where a model is confidently wrong."


def cut_below(axis: Axes, bits_max: float) -> None:
    """Leave out what lies below -N H / 4: an untrained model is confidently wrong, and its bits fill the panel."""
    if axis.get_ylim()[0] < -bits_max / 4:
        axis.set_ylim(bottom=-bits_max / 4)


def bits_against_exposures(context: Context, folder: Path) -> list[Path]:
    """Draw bits learned (storage) against exposures, one panel per base, half of N H marked."""
    bases = context.bases
    with style.figure(1, len(bases), width=max(4.4, 3.6 * len(bases)), height=4.2, sharey=False) as (
        drawn,
        axes,
    ):
        for axis, base in zip(axes, bases, strict=True):
            curves(axis, context, base, "epoch", "storage_bits")
            half = float(context.of_base(base)["bits_max"].max()) / 2
            axis.axhline(half, color="#888888", linewidth=0.8, linestyle=":")
            axis.annotate(
                "½ N H",
                (0.01, half),
                xycoords=("axes fraction", "data"),
                fontsize=7,
                va="bottom",
                color="#555555",
            )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            cut_below(axis, 2 * half)
        axes[0].set_ylabel("bits learned (storage)")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "bits-exposures", context.note(CURVE_NOTE + CUT_NOTE))


def bits_against_compute(context: Context, folder: Path) -> list[Path]:
    """Draw bits learned against training FLOPs (above) and against wall-clock (below), one column per base."""
    bases = context.bases
    with style.figure(2, len(bases), width=max(4.4, 3.6 * len(bases)), height=6.4) as (drawn, axes):
        for row, x in enumerate(("train_flops", "wall_s")):
            for axis, base in zip(axes[row * len(bases) :], bases, strict=False):
                curves(axis, context, base, x, "storage_bits")
                cut_below(axis, float(context.of_base(base)["bits_max"].max()))
                style.log_axis(axis)
            axes[row * len(bases)].set_ylabel("bits learned (storage)")
        style.legend_above(drawn, axes)
        note = CURVE_NOTE + CUT_NOTE + " Wall-clock time is that of a machine that ran several runs at a time."
        return style.save(drawn, folder, "bits-compute", context.speed_note(note))


def loss_curves(context: Context, folder: Path) -> list[Path]:
    """Draw evaluation-mode loss against training tokens, one panel per base; training-mode loss is never drawn."""
    bases = context.bases
    with style.figure(1, len(bases), width=max(4.4, 3.6 * len(bases)), height=4.2) as (drawn, axes):
        for axis, base in zip(axes, bases, strict=True):
            curves(axis, context, base, "tokens", "eval_loss")
            style.log_axis(axis)
        if not any(axis.lines for axis in axes):
            raise Missing(
                f"no run of grid {context.grid} measured its loss in evaluation mode; set train.probes above 0, then: "
                f"suite sweep {context.source}"
            )
        axes[0].set_ylabel("loss in evaluation mode, nats/token")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "loss-curves", context.note(CURVE_NOTE))


def against_rows(context: Context, folder: Path) -> list[Path]:
    """Draw figure 1 of the paper: E50 and NLL against memory rows, models without a table as horizontal references."""
    bases = context.bases
    if not (context.table["memory_rows"] > 0).any():
        raise Missing(
            f"grid {context.grid} has no model with a memory; add a family with half_keys to it, then: "
            f"suite sweep {context.source}"
        )
    with style.figure(2, len(bases), width=max(4.4, 3.6 * len(bases)), height=6.2, sharex="col") as (
        drawn,
        axes,
    ):
        notes = []
        for column, base in enumerate(bases):
            part = context.of_base(base)
            points, exposure = context.with_bits_at_common_exposure(part)
            top, bottom = axes[column], axes[len(bases) + column]
            rows_panel(top, context, points, "e50", "E50, exposures" if column == 0 else "")
            rows_panel(bottom, context, points, "nll", "answer NLL, nats" if column == 0 else "")
            bottom.set_xlabel("memory rows")
            top.set_title(f"base {base}", loc="left")
            notes.append(f"{base}: {exposure:.3g}")
        style.legend_above(drawn, axes)
        note = (
            f"Points and lines: mean over seeds, 95 % t-interval for {MIN_PAIRS}+ runs, n in the legend; "
            "faint: single runs; open: some runs censored, so the mean is a lower bound. Lines: families "
            "without a table. NLL per attribute at the last exposure all runs of a base reached "
            f"({', '.join(notes)})."
        )
        return style.save(drawn, folder, "memory-rows", context.note(note))


def rows_panel(axis: Axes, context: Context, points: pd.DataFrame, key: str, ylabel: str) -> None:
    """Draw one outcome against memory rows: tables as joined points, families without a table as lines with a
    band.

    Args:
        axis: The axes.
        context: Looks and legend entries.
        points: The runs.
        key: Column of the outcome.
        ylabel: Label of the outcome.
    """
    bounds: list[tuple[float, str]] = []
    for label, group in points[points["memory_rows"] == 0].groupby("label", sort=False):
        look, middle = context.looks[str(label)], paired(group[key].to_numpy(float))
        marks: dict[str, Any] = {"color": look.color, "linestyle": look.linestyle, "linewidth": 1.2}
        axis.axhline(middle.mean, label=context.legend(str(label)), **marks)
        if key == "e50" and group["e50_state"].eq("censored").any():
            bounds.append((middle.mean, str(label)))
        if not np.isnan(middle.low):
            axis.axhspan(middle.low, middle.high, color=look.color, alpha=0.10, linewidth=0)
    for family, members in points[points["memory_rows"] > 0].groupby("family", sort=False):
        _rows_family(axis, context, str(family), members, key)
    _bounds(axis, bounds)
    axis.set_xscale("log", base=2)
    rows = sorted(float(row) for row in points.loc[points["memory_rows"] > 0, "memory_rows"].unique())
    if rows:
        axis.set_xticks(rows, [_rows_text(round(row)) for row in rows])
        axis.minorticks_off()
        axis.set_xlim(rows[0] / 2, rows[-1] * 2)
    axis.set_ylabel(ylabel)


def _rows_text(rows: int) -> str:
    """Return a number of rows as the square of a number of half keys where it is one."""
    side = math.isqrt(rows)
    return f"{side}²" if side * side == rows else f"{rows:,}"


def _bounds(axis: Axes, bounds: list[tuple[float, str]]) -> None:
    """Draw lines that are lower bounds, named at the right edge; those too close for a line of text each share one."""
    low, high = axis.get_ylim()
    rows: list[tuple[float, list[str]]] = []
    for at, label in sorted(bounds):
        if rows and at - rows[-1][0] < 0.05 * (high - low):
            rows[-1][1].append(label)
        else:
            rows.append((at, [label]))
    for at, names in rows:
        axis.annotate(
            f"≥ {', '.join(names)}",
            (0.99, at),
            xycoords=("axes fraction", "data"),
            fontsize=6.5,
            ha="right",
            va="bottom",
            color="#555555",
        )


def _rows_family(axis: Axes, context: Context, family: str, members: pd.DataFrame, key: str) -> None:
    """Draw a family with tables: one point per number of rows, joined, with intervals; open where runs are
    censored."""
    look = context.looks[str(members["label"].iloc[0])]
    groups = [(float(group["memory_rows"].iloc[0]), group) for _, group in members.groupby("memory_rows")]
    middles = [paired(group[key].to_numpy(float)) for _, group in groups]
    everywhere = context.table[(context.table["family"] == family) & (context.table["memory_rows"] > 0)]
    counts = sorted({int(count) for count in everywhere.groupby(["base", "label"]).size()})
    count = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0])
    rows = [row for row, _ in groups]
    marks: dict[str, Any] = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker}
    axis.plot(rows, [m.mean for m in middles], label=f"{family} (n={count})", **marks)
    for row, group in groups:
        dot(axis, row, group[key].to_numpy(float), look, markerfacecolor=face(look, group, key))
