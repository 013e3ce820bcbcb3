"""Figures with one point per variant: base size, cost, compute multiplier, fits, plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparisons.multiplier_grid import multipliers_along_dense
from analysis.comparisons.paired import MIN_PAIRS, contrasts
from analysis.comparisons.trends import trends
from analysis.figures import style
from analysis.figures.scene import (
    LEGEND,
    POINT_NOTE,
    Missing,
    Scene,
    base_sizes,
    common_exposure,
    dot,
    equal_tokens,
    has_bits,
    line_of,
    no_bits,
    variant_points,
)
from analysis.figures.usage import usage_figure, usage_in_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLS: tuple[Any, ...] = ("full", "none", "left", "right", "bottom", "top")
"""How the markers of the base sizes are filled, smallest first."""


def against_base(found: Scene, folder: Path) -> list[Path]:
    """E50 and answer NLL against base size, a line per variant that stands at two base sizes or more."""
    if not has_bits(found):
        raise Missing(no_bits(found))
    if len(found.bases) < 2:
        raise Missing(
            f"grid {found.grid} has one base size; a figure against base size needs two: add a model.base to it, "
            f"then: suite sweep {found.source}"
        )
    table, exposure = common_exposure(found, found.table)
    table = table.assign(size=table["base"].map(base_sizes(found)))
    several = table.groupby("label")["base"].nunique()
    with style.figure(1, 2, width=7.0, height=3.4) as (drawn, axes):
        for axis, key, words in zip(axes, ("e50", "nll"), ("E50, exposures", "answer NLL, nats"), strict=True):
            for label in table["label"].unique():
                if several[label] < 2:
                    continue
                line_of(axis, found, label, table[table["label"] == label], "size", key)
            style.log_axis(axis)
            axis.set_xlabel("non-embedding base parameters")
            axis.set_ylabel(words)
        style.legend_above(drawn, axes)
        bound = "Open: some runs censored, so the mean is a lower bound."
        note = f"{POINT_NOTE} {bound} NLL at the last exposure all runs reached, {exposure:.3g}."
        return style.save(drawn, folder, "base-size", found.note(note))


def against_cost(found: Scene, folder: Path) -> list[Path]:
    """What each variant reaches against what it costs: training FLOPs and bytes read per token, a row per base."""
    bios = has_bits(found)
    bases = found.bases if bios else equal_tokens(found)
    if not bases:
        raise Missing(
            f"runs of grid {found.grid} ended at different numbers of tokens; without train.stop_past they end "
            f"alike: suite sweep {found.source}"
        )
    with style.figure(len(bases), 2, width=7.0, height=2.9 * len(bases), sharey="row") as (drawn, axes):
        for row, base in enumerate(bases):
            part = found.table[found.table["base"] == base]
            if bios:
                part, exposure = common_exposure(found, part)
                y, words = "nll", f"answer NLL at {exposure:.3g} exposures, nats"
            else:
                y, words = "eval_loss", "final loss in evaluation mode, nats/token"
            x = "flops_there" if bios else "train_flops"
            costs = ((x, "training FLOPs until then"), ("bytes_per_token", "bytes read per token, batch 1"))
            for axis, (key, name) in zip(axes[2 * row :], costs, strict=False):
                variant_points(axis, found, part, key, y)
                axis.set_xlabel(name)
                axis.set_title(f"base {base}", loc="left")
            axes[2 * row].set_ylabel(words)
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "cost", found.note(POINT_NOTE))


def multiplier_figure(found: Scene, folder: Path) -> list[Path]:
    """Dense compute for the same outcome over each variant's own: at half of N H by seed pair, or, without storage
    probes, at the final loss, along the dense runs of the grid."""
    if not has_bits(found):
        return _multipliers_at_loss(found, folder)
    flops = found.table.set_index(["base", "label", "seed"])["flops_to_e50"]
    rows = []
    for contrast in contrasts(list(found.runs.values())):
        if contrast.control or contrast.bound or contrast.log_flops is None:
            continue
        base, seeds = contrast.base, contrast.seeds
        ratio = [flops[base, contrast.reference, s] / flops[base, contrast.variant, s] for s in seeds]
        rows.append((f"{contrast.base} {contrast.variant}", contrast.variant, np.array(ratio)))
    if not rows:
        raise Missing(
            f"no variant of grid {found.grid} has pairs with dense whose E50 was reached by both; with more "
            f"train.epochs they are: suite sweep {found.source}"
        )
    note = (
        "Training FLOPs plain dense needs for half of N H over those the variant needs, one tick a seed pair; point: "
        f"geometric mean, 95 % t-interval from {MIN_PAIRS} pairs on. Variants with censored runs are left out."
    )
    names = [f"{text} (n={len(values)})" for text, _, values in rows]
    with _beside(names, "compute multiplier at E50") as (drawn, axis):
        for position, (_, label, values) in enumerate(rows):
            dot(axis, position, values, found.looks[label], sideways=True, ratio=True)
        return style.save(drawn, folder, "compute-multiplier", found.note(note))


def _multipliers_at_loss(found: Scene, folder: Path) -> list[Path]:
    """What each variant's final loss would have cost dense, open where that is an extrapolation."""
    known, reasons = multipliers_along_dense(list(found.runs.values()))
    known = [item for item in known if np.isfinite(item[2].value)]
    if not known:
        raise Missing(
            f"{'; '.join(reasons) or 'every loss is beyond the dense law'}; with dense at more train.tokens or "
            f"model.base, each to the end of its budget: suite sweep {found.source}"
        )
    note = (
        "FLOPs a dense run would need for the variant's final loss over the variant's own, along a power law with "
        f"offset fitted to the plain dense runs; 95 % bootstrap interval over runs, from {MIN_PAIRS} runs of the "
        "variant on. Open: no dense run reached that loss, an extrapolation."
    )
    names = [f"{base} {variant} (n={item.runs})" for base, variant, item in known]
    with _beside(names, "compute multiplier at the final loss") as (drawn, axis):
        for position, (_, variant, item) in enumerate(known):
            look, reach = found.looks[variant], None
            if np.isfinite([item.low, item.high]).all():
                reach = [[item.value - item.low], [item.high - item.value]]
            axis.errorbar(
                [item.value],
                [position],
                xerr=reach,
                color=look.color,
                marker=look.marker,
                capsize=2.5,
                markerfacecolor="white" if item.extrapolated else look.color,
            )
        return style.save(drawn, folder, "compute-multiplier", found.note(note))


@contextmanager
def _beside(names: list[str], words: str) -> Iterator[tuple[Figure, Axes]]:
    """One panel with a line per name and 1 marked."""
    with style.figure(1, 1, width=6.4, height=1.2 + 0.27 * len(names)) as (drawn, (axis,)):
        axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(words)
        yield drawn, axis


def trend_figure(found: Scene, folder: Path) -> list[Path]:
    """The log-linear fits: fitted against observed by cell, the held-out cell open, and residuals below."""
    fits = [trend for trend in trends(list(found.runs.values())) if trend.points]
    if not fits:
        raise Missing(
            f"grid {found.grid} has too few cells for a fit against table and base size; add values of model.half_keys "
            f"or model.base to it, then: suite sweep {found.source}"
        )
    with style.figure(
        2, len(fits), width=max(4.2, 3.2 * len(fits)), height=5.2, sharex="col", gridspec_kw={"height_ratios": [2, 1]}
    ) as (drawn, axes):
        for column, trend in enumerate(fits):
            top, bottom = axes[column], axes[len(fits) + column]
            values = [point[2] for point in trend.points]
            top.plot(
                [min(values), max(values)], [min(values), max(values)], color="#888888", linewidth=0.8, linestyle=":"
            )
            bottom.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
            for base, label, seen, low, high, fitted in trend.points:
                look, fill = found.looks[label], FILLS[found.bases.index(base) % len(FILLS)]
                marks: dict[str, Any] = {"color": look.color, "fillstyle": fill, "markersize": look.size}
                named = f"{base} {label}" if len(found.looks) <= LEGEND else label.split()[0]
                top.plot([seen], [fitted], look.marker, label=named, **marks)
                bottom.plot([seen], [100 * (fitted / seen - 1)], look.marker, **marks)
                top.plot([low, high], [fitted, fitted], color=look.color, linewidth=1)
                bottom.plot(
                    [seen, seen], [100 * (fitted / end - 1) for end in (low, high)], color=look.color, linewidth=1
                )
            if trend.held_out:
                seen, guess = float(trend.held_out["observed"]), float(trend.held_out["predicted"])
                ring: dict[str, Any] = {"color": "#D55E00", "markerfacecolor": "none", "markersize": 11}
                top.plot([seen], [guess], "o", label="held out, as predicted", **ring)
                bottom.plot([seen], [100 * (guess / seen - 1)], "o", **ring)
            top.margins(0.12)
            bottom.margins(y=0.2)
            top.set_title(f"{trend.family} and dense, {trend.runs} runs", loc="left")
            top.set_ylabel("fitted" if column == 0 else "")
            bottom.set_ylabel("fitted − observed, %" if column == 0 else "")
            bottom.set_xlabel(trend.outcome)
        note = (
            "ln y = a + b ln(1 + M/N) + c ln N, least squares over runs; points: geometric means of cells, 95 % "
            f"t-intervals from {MIN_PAIRS} runs on. Ring: the cell with the largest table as predicted from the "
            "others before the fit drawn."
        )
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "trend-fit", found.note(note))


def plan_figure(found: Scene, folder: Path) -> list[Path]:
    """Measured wall-clock of each run against what the plan predicted."""
    runs = [run for run in found.runs.values() if run.predicted_wall_s]
    if not runs:
        raise Missing(
            f"no predicted wall-clock in grid {found.grid}; suite plan {found.grid} predicts it before a sweep"
        )
    with style.figure(1, 1, width=4.2, height=3.8) as (drawn, (axis,)):
        named = dict(zip(found.table["run"], found.table["label"], strict=True))
        times = [(run.predicted_wall_s or 0.0, run.last("wall_s"), found.looks[named[run.name]]) for run in runs]
        for (predicted, measured, look), run in zip(times, runs, strict=True):
            label = found.named(str(named[run.name]))
            axis.plot([predicted], [measured], look.marker, color=look.color, markersize=look.size, label=label)
        style.legend_above(drawn, [axis])
        seconds = [time for pair in times for time in pair[:2]]
        ends = min(seconds) / 2, max(seconds) * 2
        axis.plot(ends, ends, color="#888888", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axis.set_xlabel("predicted, seconds")
        axis.set_ylabel("measured, seconds")
        note = "One mark a run; dotted: as predicted for the GPU that was planned for, wherever the run was."
        return style.save(drawn, folder, "plan", found.note(note))


CELL_FIGURES: list[tuple[str, Callable[[Scene, Path], list[Path]]]] = [
    ("base-size", against_base),
    ("cost", against_cost),
    ("compute-multiplier", multiplier_figure),
    ("trend-fit", trend_figure),
    ("key-usage", usage_figure),
    ("key-usage-training", usage_in_training),
    ("plan", plan_figure),
]
