"""The figures of learning: curves against exposures, FLOPs, wall-clock and tokens; E50 and NLL against memory rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.comparisons.paired import MIN_PAIRS, paired
from analysis.figures import style
from analysis.figures.scene import Missing, Scene, common_exposure, dot, face
from analysis.records.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "epoch": "exposures of every fact",
    "train_flops": "training FLOPs",
    "wall_s": "wall-clock of training, seconds",
    "tokens": "training tokens",
}


def mean_curve(runs: list[Run], x: str, y: str) -> tuple[np.ndarray, list[np.ndarray], list[list[tuple[float, float]]]]:
    """The variant's mean curve on its own probe exposures, as far as all its runs got, and each run's own
    points.

    Returns x of the mean, [mean, low, high] (low and high NaN below MIN_PAIRS runs), and the runs' (x, y)
    points.
    """
    tables = [run.probes.dropna(subset=["epoch", x, y]) for run in runs if {x, y} <= set(run.probes.columns)]
    tables = [table for table in tables if len(table)]
    if not tables:
        return np.array([]), [np.array([])] * 3, []
    last = min(float(table["epoch"].iloc[-1]) for table in tables)
    longest = min(tables, key=lambda table: float(table["epoch"].iloc[-1]))
    epochs = longest["epoch"].to_numpy(float)
    epochs = epochs[(epochs <= last) & (epochs > 0)]
    grids = {key: np.array([_resampled(table, key, epochs) for table in tables]) for key in (x, y)}
    summaries = [paired(column) for column in grids[y].T]
    middle = [np.array([getattr(item, part) for item in summaries]) for part in ("mean", "low", "high")]
    points = [list(zip(table[x].astype(float), table[y].astype(float), strict=True)) for table in tables]
    return grids[x].mean(0), middle, points


def _resampled(table: pd.DataFrame, key: str, epochs: np.ndarray) -> np.ndarray:
    """A probe column at these exposures, linear in log exposure."""
    known = table[table["epoch"] > 0]
    return np.interp(np.log(epochs), np.log(known["epoch"].to_numpy(float)), known[key].to_numpy(float))


def curves(axis: Axes, found: Scene, base: str, x: str, y: str) -> None:
    """Mean curves of every variant of a base with 95 % bands (from five runs) and each run as a thin line."""
    for label, runs in found.variants(base):
        look = found.looks[label]
        at, (mean, low, high), points = mean_curve(runs, x, y)
        if not points:
            continue
        for run in points:
            axis.plot(*zip(*run, strict=True), color=look.color, alpha=0.18, linewidth=0.6)
        axis.plot(
            at,
            mean,
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            alpha=look.alpha,
            markersize=3,
            label=found.named(label),
        )
        if len(points) >= MIN_PAIRS:
            axis.fill_between(at, low, high, color=look.color, alpha=0.15, linewidth=0)
    axis.set_xlabel(AXES[x])
    axis.set_title(f"base {base}", loc="left")


CURVE_NOTE = (
    "Thick: mean over seeds as far as all of them ran (runs stop once past half of N H); band: 95 % "
    f"t-interval, drawn from {MIN_PAIRS} runs on; thin: single runs; n: number of runs, a/b by base."
)


CUT_NOTE = " Cut off below −¼ N H, where a model is surely wrong."


def cut_below(axis: Axes, bits_max: float) -> None:
    """Leave out what lies below -N H / 4: an untrained model is surely wrong, and its bits fill the panel."""
    if axis.get_ylim()[0] < -bits_max / 4:
        axis.set_ylim(bottom=-bits_max / 4)


def bits_against_exposures(found: Scene, folder: Path) -> list[Path]:
    """Bits learned (storage) against exposures, one panel per base, half of N H marked."""
    bases = found.bases
    with style.figure(1, len(bases), width=max(4.4, 3.6 * len(bases)), height=4.2, sharey=False) as (
        drawn,
        axes,
    ):
        for axis, base in zip(axes, bases, strict=True):
            curves(axis, found, base, "epoch", "storage_bits")
            half = float(found.table[found.table["base"] == base]["bits_max"].max()) / 2
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
        return style.save(drawn, folder, "bits-exposures", found.note(CURVE_NOTE + CUT_NOTE))


def bits_against_compute(found: Scene, folder: Path) -> list[Path]:
    """Bits learned against training FLOPs (above) and against wall-clock (below), one column per base."""
    bases = found.bases
    with style.figure(2, len(bases), width=max(4.4, 3.6 * len(bases)), height=6.4) as (drawn, axes):
        for row, x in enumerate(("train_flops", "wall_s")):
            for axis, base in zip(axes[row * len(bases) :], bases, strict=False):
                curves(axis, found, base, x, "storage_bits")
                cut_below(axis, float(found.table[found.table["base"] == base]["bits_max"].max()))
                style.log_axis(axis)
            axes[row * len(bases)].set_ylabel("bits learned (storage)")
        style.legend_above(drawn, axes)
        note = CURVE_NOTE + CUT_NOTE + " Wall-clock on the machine that ran the grid, other cells beside it."
        return style.save(drawn, folder, "bits-compute", found.note(note))


def loss_curves(found: Scene, folder: Path) -> list[Path]:
    """Evaluation-mode loss against training tokens, one panel per base; training-mode loss is never drawn."""
    bases = found.bases
    with style.figure(1, len(bases), width=max(4.4, 3.6 * len(bases)), height=4.2) as (drawn, axes):
        for axis, base in zip(axes, bases, strict=True):
            curves(axis, found, base, "tokens", "eval_loss")
            style.log_axis(axis)
        axes[0].set_ylabel("loss in evaluation mode, nats/token")
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "loss-curves", found.note(CURVE_NOTE))


def against_rows(found: Scene, folder: Path) -> list[Path]:
    """The paper's figure 1 form: E50 and NLL against memory rows, dense and MoE as horizontal references."""
    bases = found.bases
    if not (found.table["memory_rows"] > 0).any():
        raise Missing(
            f"grid {found.grid} has no model with a memory; add a family with half_keys to it, then: "
            f"suite sweep {found.source}"
        )
    with style.figure(2, len(bases), width=max(4.4, 3.6 * len(bases)), height=6.2, sharex="col") as (
        drawn,
        axes,
    ):
        notes = []
        for column, base in enumerate(bases):
            part = found.table[found.table["base"] == base]
            points, exposure = common_exposure(found, part)
            top, bottom = axes[column], axes[len(bases) + column]
            rows_panel(top, found, points, "e50", "E50, exposures" if column == 0 else "")
            rows_panel(bottom, found, points, "nll", "answer NLL, nats" if column == 0 else "")
            bottom.set_xlabel("memory rows")
            top.set_title(f"base {base}", loc="left")
            notes.append(f"{base}: {exposure:.3g}")
        style.legend_above(drawn, axes)
        note = (
            f"Points and lines: mean over seeds, 95 % t-interval from {MIN_PAIRS} runs on, n in the legend; "
            "faint: single runs; open: some runs censored, so the mean is a lower bound. Lines: families "
            "without a table. NLL per attribute at the last exposure all runs of a base reached "
            f"({', '.join(notes)})."
        )
        return style.save(drawn, folder, "memory-rows", found.note(note))


def rows_panel(axis: Axes, found: Scene, points: pd.DataFrame, key: str, ylabel: str) -> None:
    """One outcome against memory rows: tables as joined points, families without a table as lines with a
    band."""
    for family, members in points.groupby("family", sort=False):
        with_table = members[members["memory_rows"] > 0]
        if len(with_table):
            _rows_family(axis, found, str(family), with_table, key)
    bounds: list[tuple[float, str]] = []
    for label, group in points[points["memory_rows"] == 0].groupby("label", sort=False):
        look, middle = found.looks[str(label)], paired(group[key].to_numpy(float))
        dashes = look.linestyle if group["family"].iloc[0] == "dense" else (0, (6, 3))  # none hides another
        axis.axhline(middle.mean, color=look.color, linestyle=dashes, linewidth=1.2, label=found.named(str(label)))
        if key == "e50" and group["e50_state"].eq("censored").any():
            bounds.append((middle.mean, str(label)))
        if not np.isnan(middle.low):
            axis.axhspan(middle.low, middle.high, color=look.color, alpha=0.10, linewidth=0)
    _bounds(axis, bounds)
    axis.set_xscale("log", base=2)
    rows = sorted(float(row) for row in points.loc[points["memory_rows"] > 0, "memory_rows"].unique())
    if rows:
        axis.set_xticks(rows, [f"{round(row**0.5)}²" for row in rows])
        axis.minorticks_off()
        axis.set_xlim(rows[0] / 2, rows[-1] * 2)
    axis.set_ylabel(ylabel)


def _bounds(axis: Axes, bounds: list[tuple[float, str]]) -> None:
    """Lines that are lower bounds, named at the right edge; those too close for a line of text each share one."""
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


def _rows_family(axis: Axes, found: Scene, family: str, members: pd.DataFrame, key: str) -> None:
    """A family with tables: one point per number of rows, joined, with intervals; open where runs are
    censored."""
    look = found.looks[str(members["label"].iloc[0])]
    groups = [(float(group["memory_rows"].iloc[0]), group) for _, group in members.groupby("memory_rows")]
    middles = [paired(group[key].to_numpy(float)) for _, group in groups]
    everywhere = found.table[(found.table["family"] == family) & (found.table["memory_rows"] > 0)]
    counts = sorted({int(count) for count in everywhere.groupby(["base", "label"]).size()})
    count = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else str(counts[0])
    rows = [row for row, _ in groups]
    axis.plot(rows, [m.mean for m in middles], color=look.color, marker=look.marker, label=f"{family} (n={count})")
    for row, group in groups:
        dot(axis, row, group[key].to_numpy(float), look, markerfacecolor=face(look, group, key))
