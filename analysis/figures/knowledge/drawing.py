"""New facts: learning against forgetting, retention, and the rows that are updated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.comparisons.knowledge import LEVEL, Learning, hull_of, learning_of
from analysis.comparisons.statistics import paired
from analysis.figures import style
from analysis.figures.context import Context, Missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_against_forgetting(context: Context, folder: Path) -> list[Path]:
    """Draw what each setting learns and forgets, and the hull of each method, a panel per family."""
    learning, _ = _start(context)
    families = list(dict.fromkeys(learning.final["family"]))
    pairs = zip(learning.final["method"], learning.final["family"], strict=True)
    kinds = {method: method.removeprefix(f"{family} ") for method, family in pairs}
    looks = style.looks([(kind, kind) for kind in kinds.values()])
    with style.figure(1, len(families), width=3.0 * len(families), height=3.2, sharey=True) as (drawn, axes):
        for axis, family in zip(axes, families, strict=True):
            methods = learning.final[learning.final["family"] == family].groupby("method", sort=False)
            for method, part in methods:
                _points(axis, part, looks[kinds[str(method)]], kinds[str(method)])
            axis.axvline(LEVEL, color="#999999", linewidth=0.8, linestyle=":")
            seeds = methods["seed"].nunique()
            axis.set_title(f"{family} (n={'-'.join(map(str, sorted({seeds.min(), seeds.max()})))})", loc="left")
            axis.set_xlabel("share of the lacking bits gained")
        axes[0].set_ylabel(learning.forgotten_unit)
        style.legend_above(drawn, axes)
        note = (
            "Points: mean over seeds of one setting (rate, rank or rows), 95 % t-intervals for 5+ seeds. Lines: "
            "lower convex hull of the settings' means and of doing nothing. Dotted: where methods are compared."
        )
        return style.save(drawn, folder, "learning-forgetting", context.note(note))


def _points(axis: Axes, part: pd.DataFrame, look: style.Look, label: str) -> None:
    """Draw the settings of one method, and the hull of their means."""
    means = part.groupby("label", sort=False)[["learned", "forgotten"]].mean()
    for _, group in part.groupby("label", sort=False):
        x, y = (paired(group[key].to_numpy(float)) for key in ("learned", "forgotten"))
        reach = [None if np.isnan(d.low) else [[d.mean - d.low], [d.high - d.mean]] for d in (x, y)]
        axis.errorbar([x.mean], [y.mean], xerr=reach[0], yerr=reach[1], color=look.color, marker=look.marker, ms=4)
    vertices = hull_of(means)
    axis.plot(vertices[:, 0], vertices[:, 1], color=look.color, linestyle=look.linestyle, label=label)


def retention(context: Context, folder: Path) -> list[Path]:
    """Draw the gain of facts after more were taught, as a share of the gain right after them, for each method's setting
    that learns the most."""
    learning, looks = _start(context)
    remaining = context.data.retention
    best = _best_settings(learning)
    with style.figure(1, 1, width=5.0, height=3.2) as (drawn, axes):
        for method, runs in best.items():
            part = remaining[remaining["run"].isin(runs) & (remaining["gain_at_first"] > 0)]
            curve = part.groupby("later")[["gain", "gain_at_first"]].mean()
            if len(curve):
                look = looks[method]
                share = curve["gain"] / curve["gain_at_first"]
                axes[0].plot(
                    curve.index, share, color=look.color, marker=look.marker, linestyle=look.linestyle, label=method
                )
        axes[0].set_ylim(bottom=0)
        axes[0].set_xlabel("facts taught later")
        axes[0].set_ylabel("gain retained")
        style.legend_above(drawn, axes)
        note = (
            "Gain in bits of the facts of a block, after further facts, over its gain at the first measurement after "
            "the block; mean over blocks and seeds. Of each method, the setting that learns the most."
        )
        return style.save(drawn, folder, "retention", context.note(note))


def rows_touched(context: Context, folder: Path) -> list[Path]:
    """Draw the share of table rows that was updated against the facts taught, for methods that train rows."""
    learning, looks = _start(context)
    table = learning.measured[learning.measured["touched"].notna()]
    if table.empty:
        raise Missing(f"no run of grid {context.grid} trains table rows; set train.trainable.kind to rows or tables")
    with style.figure(1, 1, width=5.0, height=3.2) as (drawn, axes):
        for (method, label), part in table.groupby(["method", "label"], sort=False):
            curve, look = part.groupby("taught")["touched"].mean(), looks[str(method)]
            final = float(curve.iloc[-1])
            axes[0].plot(curve.index, 100 * curve, color=look.color, linestyle=look.linestyle, label=str(method))
            axes[0].annotate(_setting(str(label)), (float(curve.index[-1]), 100 * final), fontsize=5.5, color="#555555")
        axes[0].set_xlabel("facts taught")
        axes[0].set_ylabel("rows updated so far, %")
        axes[0].margins(x=0.25)
        style.legend_above(drawn, axes)
        return style.save(
            drawn, folder, "rows-touched", context.note("Mean over seeds and tables, a line per setting.")
        )


def _start(context: Context) -> tuple[Learning, dict[str, style.Look]]:
    """Return the runs that were taught facts and the look of each method. Raises Missing without such runs."""
    learning = learning_of(context.data)
    if learning is None:
        raise Missing(
            f"no run of grid {context.grid} was taught new facts; they come with data.kind new_people or facts, and "
            f"train.probe_every: suite sweep {context.source}"
        )
    return learning, style.looks([(method, method) for method in learning.methods()])


def _best_settings(learning: Learning) -> dict[str, list[int]]:
    """Return method -> positions of the runs of its setting with the largest mean gain."""
    best = {}
    for method, part in learning.final.groupby("method", sort=False):
        label = part.groupby("label")["learned"].mean().idxmax()
        best[str(method)] = part.loc[part["label"] == label, "run"].tolist()
    return best


def _setting(label: str) -> str:
    """Return what distinguishes a setting: rows and rate."""
    return " ".join(part for part in label.split() if part.startswith(("top=", "value_lr=")))
