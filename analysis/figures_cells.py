"""Figures with one point per variant: base size, cost, final scores, compute multiplier, fits, plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import style
from analysis.compare import MIN_PAIRS, contrasts, final_scores
from analysis.figures_usage import usage_figure, usage_in_training
from analysis.scene import BESIDE, POINT_NOTE, Missing, Scene, common_exposure, dot, equal_tokens
from analysis.trends import trends

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 24
NO_BITS = "no storage probes in grid {}; they come with bios data and train.probes > 0"


def _need_bits(found: Scene) -> None:
    if not found.table["e50_state"].ne("none").any():
        raise Missing(NO_BITS.format(found.grid))


def against_base(found: Scene, folder: Path) -> list[Path]:
    """E50 and answer NLL against base size, a line per variant that stands at two base sizes or more."""
    _need_bits(found)
    if len(found.bases) < 2:
        raise Missing(f"grid {found.grid} has one base size; a figure against base size needs two or more")
    sizes = {base: _base_parameters(found, base) for base in found.bases}
    table, exposure = common_exposure(found, found.table)
    several = table.groupby("label")["base"].nunique()
    with style.figure(1, 2, width=7.0, height=3.4) as (drawn, axes):
        for axis, key, words in zip(axes, ("e50", "nll"), ("E50, exposures", "answer NLL, nats"), strict=True):
            for label in table["label"].unique():
                if several[label] < 2:
                    continue
                look, groups = found.looks[label], table[table["label"] == label].groupby("base")
                points = sorted((sizes[str(base)], group[key].to_numpy(float)) for base, group in groups)
                middle = [values.mean() for _, values in points]
                axis.plot([size for size, _ in points], middle, color=look.color, linestyle=look.linestyle,
                          marker=look.marker, label=found.named(label))  # fmt: skip
                for size, values in points:
                    dot(axis, size, values, look)
            style.log_axis(axis)
            axis.set_xlabel("non-embedding base parameters")
            axis.set_ylabel(words)
        style.legend_above(drawn, axes)
        note = POINT_NOTE + f" NLL at the last exposure all runs reached, {exposure:.3g}."
        return style.save(drawn, folder, "base-size", found.note(note))


def _base_parameters(found: Scene, base: str) -> float:
    """Non-embedding parameters of the plain dense model of a base; of its smallest model where there is none."""
    part = found.table[found.table["base"] == base]
    plain = part[part["family"].eq("dense") & ~part["reshaped"]]
    rest = plain if len(plain) else part
    return float((rest["params_total"] - rest["params_embedding"].fillna(0)).min())


def against_cost(found: Scene, folder: Path) -> list[Path]:
    """What each variant reaches against what it costs: training FLOPs and bytes read per token, a row per base."""
    bios = bool(found.table["e50_state"].ne("none").any())
    bases = found.bases if bios else equal_tokens(found)
    if not bases:
        raise Missing(f"runs of grid {found.grid} ended at different numbers of tokens")
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
                _points(axis, found, part, key, y)
                axis.set_xlabel(name)
                axis.set_title(f"base {base}", loc="left")
            axes[2 * row].set_ylabel(words)
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, "cost", found.note(POINT_NOTE))


def _points(axis: Axes, found: Scene, part: pd.DataFrame, x: str, y: str) -> None:
    """One point per variant; members of a family differ in size and are named beside the point."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ranks: dict[str, int] = {}
    for label, group in part.groupby("label", sort=False):
        family, look, at = str(group["family"].iloc[0]), found.looks[str(label)], float(group[x].mean())
        rank = ranks[family] = ranks.get(family, -1) + 1
        marks: dict[str, Any] = {
            "color": look.color,
            "marker": look.marker,
            "linestyle": "none",
            "markersize": 4 + 1.5 * rank,
        }
        axis.plot([], [], label=found.named(str(label)), **marks)
        if np.isfinite(at):
            dot(axis, at, group[y].to_numpy(float), look, markersize=marks["markersize"])
            axis.annotate(str(label).removeprefix(family).strip(), (at, float(group[y].mean())), fontsize=6,
                          color="#555555", xytext=(6, -2), textcoords="offset points")  # fmt: skip
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _ratios(found: Scene, folder: Path, name: str, words: str, note: str,
            rows: list[tuple[str, str, np.ndarray]]) -> list[Path]:  # fmt: skip
    """One line per row: (text, label, ratios of its pairs), with geometric mean and interval sideways."""
    with style.figure(1, 1, width=6.4, height=1.2 + 0.27 * len(rows)) as (drawn, (axis,)):
        for position, (_, label, values) in enumerate(rows):
            dot(axis, position, values, found.looks[label], sideways=True, ratio=True)
        axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(rows)), [f"{text} (n={len(values)})" for text, _, values in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(words)
        return style.save(drawn, folder, name, found.note(note))


def final_scores_figure(found: Scene, folder: Path) -> list[Path]:
    """Final evaluation-mode loss, bits per byte and task scores by variant, for bases of equal tokens."""
    scores = {name: final_scores(run) for name, run in found.runs.items()}
    bases = equal_tokens(found)
    if not bases:
        raise Missing(f"runs of grid {found.grid} ended at different numbers of tokens")
    named = {key for score in scores.values() for key in score if not key.endswith(("/bits_max", "/bits"))}
    keys = sorted(named, key=lambda key: (key != "eval/nll", key))[:12]
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    count = sum(len(found.variants(base)) for base in bases)
    if count > MANY:
        raise Missing(f"grid {found.grid} has {count} variants at equal tokens; more than {MANY} are not drawn")
    width, height = 1.8 + 2.4 * columns, rows * (0.9 + 0.25 * count)
    with style.figure(rows, columns, width, height, sharey=True) as (drawn, axes):
        names = [f"{base} {found.named(label)}" for base in bases for label, _ in found.variants(base)]
        for axis, key in zip(axes, keys, strict=False):
            variants = [(label, runs) for base in bases for label, runs in found.variants(base)]
            for position, (label, runs) in enumerate(variants):
                values = np.array([scores[run.name][key] for run in runs if key in scores[run.name]])
                if len(values):
                    dot(axis, position, values, found.looks[label], sideways=True)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel({"eval/nll": "loss in evaluation mode, nats/token"}.get(key, key))
        for axis in axes[len(keys) :]:
            axis.set_axis_off()
        return style.save(drawn, folder, "final-scores", found.note(BESIDE))


def multiplier_figure(found: Scene, folder: Path) -> list[Path]:
    """Dense compute for half of N H over each variant's, by seed pair, against plain dense of the same base."""
    _need_bits(found)
    flops = found.table.set_index(["base", "label", "seed"])["flops_to_e50"]
    rows = []
    for contrast in contrasts(list(found.runs.values())):
        if contrast.control or contrast.bound or contrast.log_flops is None:
            continue
        base, seeds = contrast.base, contrast.seeds
        ratio = [flops[base, contrast.reference, s] / flops[base, contrast.variant, s] for s in seeds]
        rows.append((f"{contrast.base} {contrast.variant}", contrast.variant, np.array(ratio)))
    if not rows:
        raise Missing(f"no variant of grid {found.grid} has pairs with dense whose E50 was reached by both")
    note = (
        "Training FLOPs plain dense needs for half of N H over those the variant needs, one tick a seed pair; point: "
        f"geometric mean, 95 % t-interval from {MIN_PAIRS} pairs on. Variants with censored runs are left out."
    )
    return _ratios(found, folder, "compute-multiplier", "compute multiplier at E50", note, rows)


def trend_figure(found: Scene, folder: Path) -> list[Path]:
    """The log-linear fits: fitted against observed by cell, the held-out cell open, and residuals below."""
    fits = [trend for trend in trends(list(found.runs.values())) if trend.points]
    if not fits:
        raise Missing(f"grid {found.grid} has too few cells for a fit against table and base size")
    with style.figure(2, len(fits), width=max(4.2, 3.2 * len(fits)), height=5.2, sharex="col",
                      gridspec_kw={"height_ratios": [2, 1]}) as (drawn, axes):  # fmt: skip
        for column, trend in enumerate(fits):
            top, bottom = axes[column], axes[len(fits) + column]
            values = [point[2] for point in trend.points]
            top.plot(
                [min(values), max(values)], [min(values), max(values)], color="#888888", linewidth=0.8, linestyle=":"
            )
            bottom.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
            for base, label, seen, fitted in trend.points:
                look = found.looks[label]
                top.plot([seen], [fitted], look.marker, color=look.color, alpha=look.alpha)
                bottom.plot([seen], [100 * (fitted / seen - 1)], look.marker, color=look.color, alpha=look.alpha)
                words = f"{base} {label.removeprefix(trend.family).strip()}"
                top.annotate(words, (seen, fitted), fontsize=6, color="#555555",
                             xytext=(4, -6), textcoords="offset points")  # fmt: skip
            if trend.held_out:
                seen, guess = float(trend.held_out["observed"]), float(trend.held_out["predicted"])
                top.plot([seen], [guess], "o", color="#D55E00", markerfacecolor="none", markersize=9)
                bottom.plot(
                    [seen], [100 * (guess / seen - 1)], "o", color="#D55E00", markerfacecolor="none", markersize=9
                )
            top.margins(x=0.2)
            top.set_title(f"{trend.family} and dense, {trend.runs} runs", loc="left")
            top.set_ylabel("fitted" if column == 0 else "")
            bottom.set_ylabel("fitted − observed, %" if column == 0 else "")
            bottom.set_xlabel(trend.outcome)
        note = (
            "ln y = a + b ln(1 + M/N) + c ln N, least squares over runs; points: geometric means of cells. Ring: the "
            "cell with the largest table as predicted from the others before the fit drawn."
        )
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
        for predicted, measured, look in times:
            axis.plot([predicted], [measured], look.marker, color=look.color)
        ends = [min(t[0] for t in times), max(t[0] for t in times)]
        axis.plot(ends, ends, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("predicted, seconds")
        axis.set_ylabel("measured, seconds")
        return style.save(drawn, folder, "plan", found.note("One mark a run; dotted: as predicted."))


CELL_FIGURES: list[tuple[str, Callable[[Scene, Path], list[Path]]]] = [
    ("base-size", against_base),
    ("cost", against_cost),
    ("compute-multiplier", multiplier_figure),
    ("trend-fit", trend_figure),
    ("key-usage", usage_figure),
    ("key-usage-training", usage_in_training),
    ("final-scores", final_scores_figure),
    ("plan", plan_figure),
]
