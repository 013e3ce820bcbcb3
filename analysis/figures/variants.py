"""Figures with one point per variant: base size, cost, compute multiplier, fits, plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import MIN_PAIRS
from analysis.figures import style
from analysis.figures.context import POINT_NOTE, Context, Missing
from analysis.figures.marks import dot, line_over_bases, variant_points
from analysis.figures.tables.usage import hit_rates, table_bytes, usage_figure, usage_in_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLS: tuple[Any, ...] = ("full", "none", "left", "right", "bottom", "top")
"""How the markers of the base sizes are filled, smallest first."""
ROWS = 40
"""Most rows of a figure with a row per variant."""


def against_base(context: Context, folder: Path) -> list[Path]:
    """Draw E50 and answer NLL against base size, a line per variant of two base sizes or more."""
    if not context.data.has_bits:
        raise Missing(context.no_bits())
    if len(context.bases) < 2:
        raise Missing(
            f"grid {context.grid} has one base size; a figure against base size needs two: add a model.base to it, "
            f"then: suite sweep {context.source}"
        )
    table, exposure = context.with_bits_at_common_exposure(context.table)
    table = table.assign(size=table["base"].map(context.base_sizes()))
    several = table.groupby("label")["base"].nunique()
    with style.figure(1, 2, width=7.0, height=3.4) as (drawn, axes):
        for axis, key, ylabel in zip(axes, ("e50", "nll"), ("E50, exposures", "answer NLL, nats"), strict=True):
            for label in table["label"].unique():
                if several[label] < 2:
                    continue
                line_over_bases(axis, context, label, table[table["label"] == label], "size", key)
            style.log_axis(axis)
            axis.set_xlabel("non-embedding base parameters")
            axis.set_ylabel(ylabel)
        style.legend_above(drawn, axes)
        bound = "Open: some runs censored, so the mean is a lower bound."
        note = f"{POINT_NOTE} {bound} NLL at the last exposure all runs reached, {exposure:.3g}."
        return style.save(drawn, folder, "base-size", context.note(note))


def against_cost(context: Context, folder: Path) -> list[Path]:
    """Draw what each variant reaches against what it costs: training FLOPs and bytes read per token, a row per base."""
    bios = context.data.has_bits
    bases = context.bases if bios else context.bases_of_equal_tokens()
    with style.figure(len(bases), 2, width=7.0, height=2.9 * len(bases), sharey="row") as (drawn, axes):
        for row, base in enumerate(bases):
            part = context.of_base(base)
            if bios:
                part, exposure = context.with_bits_at_common_exposure(part)
                y, ylabel = "nll", f"answer NLL at {exposure:.3g} exposures, nats"
            else:
                y, ylabel = "eval_loss", "final loss in evaluation mode, nats/token"
            x = "flops_there" if bios else "train_flops"
            costs = ((x, "training FLOPs until then"), ("bytes_per_token", "bytes read per token, batch 1"))
            for axis, (key, name) in zip(axes[2 * row :], costs, strict=False):
                variant_points(axis, context, part, key, y)
                axis.set_xlabel(name)
                axis.set_title(f"base {base}", loc="left")
            axes[2 * row].set_ylabel(ylabel)
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "cost", context.note(POINT_NOTE))


def multiplier_figure(context: Context, folder: Path) -> list[Path]:
    """Draw the compute of the reference for the same outcome over each variant's own: at half of N H by pair of seeds;
    without storage probes at the final loss, along the reference's runs."""
    if not context.data.has_bits:
        return _multipliers_at_loss(context, folder)
    ratios: dict[tuple[str, str], list[np.ndarray]] = {}
    for contrast in context.comparisons.contrasts:
        label = context.drawn_as.get(contrast.variant)
        if label in context.looks and not (contrast.control or contrast.bound) and contrast.log_flops is not None:
            ratios.setdefault((contrast.base, str(label)), []).append(contrast.flops_ratios)
    reference = context.data.reference
    if not ratios:
        raise Missing(
            f"no variant of grid {context.grid} has pairs with {reference} in which both reached E50; with more "
            f"train.epochs they do: suite sweep {context.source}"
        )
    note = (
        f"Training FLOPs that plain {reference} needs for half of N H over those that the variant needs, a tick per "
        f"pair of seeds; point: geometric mean, 95 % t-interval for {MIN_PAIRS}+ pairs. Variants with censored runs "
        "are left out."
    )
    rows = [(base, label, np.concatenate(values)) for (base, label), values in ratios.items()]
    names = [f"{base} {label} (n={len(values)})" for base, label, values in rows]
    with _named_rows(names, "compute multiplier at E50") as (drawn, axis):
        for position, (_, label, values) in enumerate(rows):
            dot(axis, position, values, context.looks[label], sideways=True, ratio=True)
        return style.save(drawn, folder, "compute-multiplier", context.note(note))


def _multipliers_at_loss(context: Context, folder: Path) -> list[Path]:
    """Draw the compute of the reference for each variant's final loss, open where that is an extrapolation."""
    multipliers, reasons = context.comparisons.multipliers
    drawn_rows = [item for item in multipliers if np.isfinite(item[2].value) and item[1] in context.drawn_as]
    reference = context.data.reference
    if not drawn_rows:
        reasons = reasons or sorted({item.reason for _, _, item in multipliers if item.reason})
        raise Missing(
            f"{'; '.join(reasons) or 'every loss is beyond the law of the reference'}; with {reference} at more "
            f"train.tokens or model.base, each to the end of its budget: suite sweep {context.source}"
        )
    note = (
        f"FLOPs that a {reference} run would need for the variant's final loss over the variant's own, along a power "
        f"law with offset fitted to the envelope of the plain {reference} runs; 95 % bootstrap interval over runs, "
        f"for {MIN_PAIRS}+ runs of the variant. The curve misses its own runs by {drawn_rows[0][2].misfit:.2g} "
        "nats (root mean square); variants closer to it than that are left out. Open: no run of the curve reached that "
        "loss, an extrapolation."
    )
    if len(drawn_rows) > ROWS:
        note += f" {len(drawn_rows) - ROWS} of {len(drawn_rows)} are not drawn; all are in the report's table."
    names = [f"{base} {variant} (n={item.runs})" for base, variant, item in drawn_rows[:ROWS]]
    with _named_rows(names, "compute multiplier at the final loss") as (drawn, axis):
        for position, (_, variant, item) in enumerate(drawn_rows[:ROWS]):
            look, reach = context.looks.get(context.drawn_as[variant], style.PLAIN), None
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
        return style.save(drawn, folder, "compute-multiplier", context.note(note))


@contextmanager
def _named_rows(names: list[str], xlabel: str) -> Iterator[tuple[Figure, Axes]]:
    """One panel with a row per name and a line at 1."""
    names = style.row_names(names)
    with style.figure(1, 1, width=6.4, height=1.2 + style.row_height(names) * len(names)) as (drawn, (axis,)):
        axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(xlabel)
        yield drawn, axis


def trend_figure(context: Context, folder: Path) -> list[Path]:
    """Draw the log-linear fits: fitted against observed by variant, the held-out one as a ring, and residuals below."""
    fits = [trend for trend in context.comparisons.trends if trend.points]
    if not fits:
        raise Missing(
            f"grid {context.grid} has too few variants for a fit against table and base size; add values of "
            f"model.half_keys or model.base to it, then: suite sweep {context.source}"
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
            points = pd.DataFrame(trend.points, columns=["base", "label", "seen", "low", "high", "fitted"])
            points = points.assign(drawn=points["label"].map(context.drawn_as), error=points["fitted"] / points["seen"])
            for (base, drawn_as), group in points.groupby(["base", "drawn"], sort=False):
                look = context.looks.get(str(drawn_as), style.PLAIN)
                fill = FILLS[context.bases.index(str(base)) % len(FILLS)]
                size = look.size if len(points) <= ROWS else 2.0
                marks: dict[str, Any] = {
                    "color": look.color,
                    "fillstyle": fill,
                    "markersize": size,
                    "linestyle": "none",
                }
                marks["marker"] = look.marker
                top.plot(group["seen"], group["fitted"], label=f"{base} {drawn_as}", **marks)
                bottom.plot(group["seen"], 100 * (group["error"] - 1), **marks)
                if len(points) <= ROWS:
                    _intervals(top, bottom, group, look.color)
            if trend.held_out:
                seen, guess = float(trend.held_out["observed"]), float(trend.held_out["predicted"])
                ring: dict[str, Any] = {"color": "#D55E00", "markerfacecolor": "none", "markersize": 11}
                top.plot([seen], [guess], "o", label="held out, as predicted", **ring)
                bottom.plot([seen], [100 * (guess / seen - 1)], "o", **ring)
            top.margins(0.12)
            bottom.margins(y=0.2)
            top.set_title(f"{trend.variant} and {context.data.reference}, {trend.runs} runs", loc="left")
            top.set_ylabel("fitted" if column == 0 else "")
            bottom.set_ylabel("fitted − observed, %" if column == 0 else "")
            bottom.set_xlabel(trend.outcome)
        note = (
            "ln y = a + b ln(1 + M/N) + c ln N, least squares over runs; points: geometric means of variants, 95 % "
            f"t-intervals for {MIN_PAIRS}+ runs (not for more than {ROWS} variants). Ring: the variant with "
            "the largest table as predicted from the others before the fit drawn."
        )
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "trend-fit", context.note(note))


def _intervals(top: Axes, bottom: Axes, points: pd.DataFrame, color: str) -> None:
    """Draw the intervals of the observed means: along x in the fit, along y in the residuals."""
    top.hlines(points["fitted"], points["low"], points["high"], color=color, linewidth=1)
    low, high = (100 * (points["fitted"] / points[end] - 1) for end in ("low", "high"))
    bottom.vlines(points["seen"], low, high, color=color, linewidth=1)


def plan_figure(context: Context, folder: Path) -> list[Path]:
    """Draw the measured wall-clock of each run against the plan's prediction."""
    runs = context.table[context.table["predicted_wall_s"].gt(0) & context.table["wall_s"].gt(0)]
    if runs.empty:
        raise Missing(
            f"no plan of grid {context.grid} for the device of its runs; suite plan {context.source} --gpu GPU or cpu"
        )
    with style.figure(1, 1, width=4.2, height=3.8) as (drawn, (axis,)):
        for label, group in runs.groupby("label", sort=False):
            look = context.looks[str(label)]
            marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": look.size}
            name = context.legend(str(label))
            axis.plot(group["predicted_wall_s"], group["wall_s"], linestyle="none", label=name, **marks)
        style.legend_above(drawn, [axis])
        seconds = runs[["predicted_wall_s", "wall_s"]].to_numpy(float)
        ends = seconds.min() / 2, seconds.max() * 2
        axis.plot(ends, ends, color="#888888", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axis.set_xlabel("predicted, seconds")
        axis.set_ylabel("measured, seconds")
        note = "One mark per run that was trained on the planned device; dotted: measured as predicted."
        return style.save(drawn, folder, "plan", context.note(note))


CELL_FIGURES: list[tuple[str, Callable[[Context, Path], list[Path]]]] = [
    ("base-size", against_base),
    ("cost", against_cost),
    ("compute-multiplier", multiplier_figure),
    ("trend-fit", trend_figure),
    ("key-usage", usage_figure),
    ("key-usage-training", usage_in_training),
    ("hit-rates", hit_rates),
    ("table-bytes", table_bytes),
    ("plan", plan_figure),
]
