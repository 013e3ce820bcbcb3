"""The figures of final scores: against memory rows, base size, training FLOPs and bytes, and side by side.

Only runs that ended at the same number of tokens stand in one panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.comparisons.paired import final_scores
from analysis.figures import style
from analysis.figures.learning import rows_panel
from analysis.figures.scene import BESIDE, POINT_NOTE, Missing, Scene, base_sizes, dot, equal_tokens, line_of
from analysis.records.published import printed_as

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 24
VARIANTS = 24
LOSS = "evaluation loss, nats/token"


def scores_against_rows(found: Scene, folder: Path) -> list[Path]:
    """Final scores against memory rows, dense and MoE as references, published points of the same base beside."""
    with_memory = set(found.table.loc[found.table["memory_rows"] > 0, "base"])
    bases = [base for base in _bases(found) if base in with_memory]
    if not bases:
        raise Missing(
            f"grid {found.grid} has no model with a memory that ended at the same tokens as all others; "
            f"add a family with half_keys to it, then: suite sweep {found.source}"
        )

    def panel(axis: Axes, base: str, key: str) -> None:
        points = _points(found, found.table[found.table["base"] == base], key)
        _published(axis, found, base, key)
        if len(points):
            rows_panel(axis, found, points, "value", _named(key))
        axis.set_title(f"base {base}", loc="left")
        axis.set_xlabel("memory rows")

    note = f"{POINT_NOTE} Grey crosses: published, as the source prints them (confidence: A two transcriptions or the "
    note += "paper's text, B one, C read off a figure); never fitted with ours."
    return _panels(found, folder, "scores-rows", [(base, key) for base in bases for key in _keys(found)], panel, note)


def scores_against_base(found: Scene, folder: Path) -> list[Path]:
    """Final scores against base size, a line per variant that stands at two base sizes or more."""
    bases, sizes = _bases(found), base_sizes(found)
    if len(bases) < 2:
        raise Missing(
            f"grid {found.grid} has {len(bases)} base size whose runs ended at equal tokens; a figure against base "
            f"size needs two: add a model.base to it, then: suite sweep {found.source}"
        )
    table = found.table.assign(size=found.table["base"].map(sizes))

    def panel(axis: Axes, _: str, key: str) -> None:
        points = _points(found, table[table["base"].isin(bases)], key)
        for label in points["label"].unique():
            part = points[points["label"] == label]
            if part["base"].nunique() > 1:
                line_of(axis, found, label, part, "size", "value")
        style.log_axis(axis)
        axis.set_ylabel(_named(key))
        axis.set_xlabel("base parameters")

    note = POINT_NOTE + " Base parameters: of plain dense, without embeddings."
    return _panels(found, folder, "scores-base", [("", key) for key in _keys(found)], panel, note)


def scores_against_cost(found: Scene, folder: Path) -> list[Path]:
    """Final scores against training FLOPs and against bytes read per token, a variant's base sizes joined."""
    costs = {"train_flops": "training FLOPs", "bytes_per_token": "bytes read per token, batch 1"}
    table = found.table[found.table["base"].isin(_bases(found))]

    def panel(axis: Axes, cost: str, key: str) -> None:
        points = _points(found, table.dropna(subset=[cost]), key)
        for label in points["label"].unique():
            line_of(axis, found, label, points[points["label"] == label], cost, "value")
        style.log_axis(axis)
        axis.set_ylabel(_named(key))
        axis.set_xlabel(costs[cost])

    panels = [(cost, key) for key in _keys(found) for cost in costs]
    return _panels(found, folder, "scores-cost", panels, panel, POINT_NOTE + " Lines join base sizes.", columns=4)


def final_scores_figure(found: Scene, folder: Path) -> list[Path]:
    """Final evaluation-mode loss, bits per byte and task scores by variant, side by side."""
    bases = _bases(found)
    names = [f"{base} {found.named(label)}" for base in bases for label, _ in found.variants(base)]
    if len(names) > VARIANTS:
        raise Missing(
            f"grid {found.grid} has {len(names)} variants at equal tokens, and at most {VARIANTS} are drawn side by "
            f"side; all are in the table of: python -m analysis report --grid {found.grid}"
        )

    from matplotlib.ticker import MaxNLocator

    def panel(axis: Axes, _: str, key: str) -> None:
        position = 0
        for base in bases:
            points = _points(found, found.table[found.table["base"] == base], key)
            for label, _runs in found.variants(base):
                values = points.loc[points["label"] == label, "value"].to_numpy(float)
                if len(values):
                    dot(axis, position, values, found.looks[label], sideways=True)
                position += 1
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(_named(key))

    panels, height = [("", key) for key in _keys(found)], 0.9 + 0.25 * len(names)
    return _panels(found, folder, "final-scores", panels, panel, BESIDE, height=height, margin=1.8, sharey=True)


def _bases(found: Scene) -> list[str]:
    """Bases whose runs ended at equal tokens; Missing where there is none."""
    bases = equal_tokens(found)
    if not bases:
        raise Missing(
            f"runs of grid {found.grid} ended at different numbers of tokens; without train.stop_past they end "
            f"alike: suite sweep {found.source}"
        )
    return bases


def _keys(found: Scene) -> list[str]:
    """The scores there are, evaluation-mode loss first; bits are drawn as learning curves."""
    named = {
        key for run in found.runs.values() for key in final_scores(run) if not key.endswith(("/bits_max", "/bits"))
    }
    return sorted(named, key=lambda key: (key != "eval/nll", key))


def _named(key: str) -> str:
    return LOSS if key == "eval/nll" else key


def _points(found: Scene, part: pd.DataFrame, key: str) -> pd.DataFrame:
    """The runs that have a score, with it as `value`."""
    values = [final_scores(found.runs[name]).get(key, np.nan) for name in part["run"]]
    return part.assign(value=values).dropna(subset=["value"])


def _panels(
    found: Scene,
    folder: Path,
    name: str,
    panels: Sequence[tuple[str, str]],
    panel: Callable[[Axes, str, str], None],
    note: str,
    columns: int = 3,
    height: float = 2.4,
    margin: float = 0.0,
    sharey: bool = False,
) -> list[Path]:
    """A figure of one panel per (where, score); scores beyond PANELS panels are named in the footnote."""
    keys = list(dict.fromkeys(key for _, key in panels))
    room = max(1, PANELS * len(keys) // len(panels))
    if len(keys) > room:
        note += f" Not drawn for want of room: {', '.join(keys[room:])}."
    panels = [(where, key) for where, key in panels if key in keys[:room]]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = max(4.4, margin + 2.6 * columns)
    with style.figure(rows, columns, width, rows * height + 0.6, sharey=sharey) as (drawn, axes):
        for axis, (where, key) in zip(axes, panels, strict=False):
            panel(axis, where, key)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, name, found.note(note))


def _published(axis: Axes, found: Scene, base: str, key: str) -> None:
    """Published values of the same base, task and metric, by memory rows; each with its family and confidence."""
    if found.published is None:
        return
    task, _, metric = key.partition("/")
    task, metric = printed_as(task, metric)
    same = found.published[(found.published["base"] == base) & (found.published["task"] == task)]
    same = same[(same["metric"] == metric) & (same["memory_rows"] > 0)]
    for source, group in same.groupby("source"):
        axis.plot(group["memory_rows"], group["value"], "x", color="#777777", label=f"published: {source}")
        for row in group.drop_duplicates(["memory_rows", "family"]).to_dict("records"):
            text = f"{row['family']} {row['confidence'][:1]}"
            axis.annotate(
                text,
                (row["memory_rows"], row["value"]),
                xytext=(4, -2),
                textcoords="offset points",
                fontsize=6,
                color="#777777",
            )


SCORE_FIGURES: list[tuple[str, Callable[[Scene, Path], list[Path]]]] = [
    ("scores-rows", scores_against_rows),
    ("scores-base", scores_against_base),
    ("scores-cost", scores_against_cost),
    ("final-scores", final_scores_figure),
]
