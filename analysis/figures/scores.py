"""The figures of final scores: against memory rows, base size, training FLOPs and bytes, and side by side.

One panel holds one score: the same task, prompts, few-shot examples, questions and data, of runs that ended at the same
number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.comparisons.direction import arrow
from analysis.figures import style
from analysis.figures.context import POINT_NOTE, SIDE_BY_SIDE, Context, Missing
from analysis.figures.learning import rows_panel
from analysis.figures.marks import dot, line_over_bases
from analysis.records.published import printed_as
from analysis.records.scores import LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 24
VARIANTS = 24


def scores_against_rows(context: Context, folder: Path) -> list[Path]:
    """Draw final scores against memory rows, with models without a table and published points of the same base."""
    with_memory = set(context.table.loc[context.table["memory_rows"] > 0, "base"])
    bases = [base for base in context.bases_of_equal_tokens() if base in with_memory]
    if not bases:
        raise Missing(
            f"grid {context.grid} has no model with a memory that ended at the same tokens as all others; "
            f"add a family with half_keys to it, then: suite sweep {context.source}"
        )

    def panel(axis: Axes, base: str, score: int) -> None:
        points = _points(context, context.of_base(base), score)
        _published(axis, context, base, score)
        if len(points):
            rows_panel(axis, context, points, "value", _title(context, score))
        _imported(axis, context, score)
        axis.set_title(f"base {base}", loc="left")
        axis.set_xlabel("memory rows")

    note = f"{POINT_NOTE} Grey crosses: published, as the source prints them (confidence: A two transcriptions or the "
    note += "paper's text, B one, C read off a figure); never fitted with ours."
    return _panels(
        context, folder, "scores-rows", [(base, score) for base in bases for score in _scores(context)], panel, note
    )


def scores_against_base(context: Context, folder: Path) -> list[Path]:
    """Draw final scores against base size, a line per variant of two base sizes or more."""
    bases, sizes = context.bases_of_equal_tokens(), context.base_sizes()
    if len(bases) < 2:
        raise Missing(
            f"grid {context.grid} has {len(bases)} base size whose runs ended at equal tokens; a figure against base "
            f"size needs two: add a model.base to it, then: suite sweep {context.source}"
        )
    table = context.table.assign(size=context.table["base"].map(sizes))

    def panel(axis: Axes, _: str, score: int) -> None:
        points = _points(context, table[table["base"].isin(bases)], score)
        for label in points["label"].unique():
            part = points[points["label"] == label]
            if part["base"].nunique() > 1:
                line_over_bases(axis, context, label, part, "size", "value")
        _imported(axis, context, score)
        style.log_axis(axis)
        axis.set_ylabel(_title(context, score))
        axis.set_xlabel("base parameters")

    note = POINT_NOTE + f" Base parameters: of plain {context.data.reference}, without embeddings."
    return _panels(context, folder, "scores-base", [("", score) for score in _scores(context)], panel, note)


def scores_against_cost(context: Context, folder: Path) -> list[Path]:
    """Draw final scores against training FLOPs and against bytes read per token, a variant's base sizes joined."""
    costs = {"train_flops": "training FLOPs", "bytes_per_token": "bytes read per token, batch 1"}
    table = context.table[context.table["base"].isin(context.bases_of_equal_tokens())]

    def panel(axis: Axes, cost: str, score: int) -> None:
        points = _points(context, table.dropna(subset=[cost]), score)
        for label in points["label"].unique():
            line_over_bases(axis, context, label, points[points["label"] == label], cost, "value")
        _imported(axis, context, score)
        style.log_axis(axis)
        axis.set_ylabel(_title(context, score))
        axis.set_xlabel(costs[cost])

    panels = [(cost, score) for score in _scores(context) for cost in costs]
    return _panels(context, folder, "scores-cost", panels, panel, POINT_NOTE + " Lines join base sizes.", columns=4)


def final_scores_figure(context: Context, folder: Path) -> list[Path]:
    """Draw final evaluation-mode loss, bits per byte and task scores by variant, side by side."""
    bases = context.bases_of_equal_tokens()
    names = style.row_names(
        [f"{base} {context.legend(label)}" for base in bases for label, _ in context.variants(base)]
    )
    if len(names) > VARIANTS:
        raise Missing(
            f"grid {context.grid} has {len(names)} variants at equal tokens, and at most {VARIANTS} are drawn side by "
            f"side; all are in the table of: python -m analysis report --grid {context.grid}"
        )

    from matplotlib.ticker import MaxNLocator

    def panel(axis: Axes, _: str, score: int) -> None:
        position = 0
        for base in bases:
            points = _points(context, context.of_base(base), score)
            for label, _runs in context.variants(base):
                values = points.loc[points["label"] == label, "value"].to_numpy(float)
                if len(values):
                    dot(axis, position, values, context.looks[label], sideways=True)
                position += 1
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel(_title(context, score))

    panels, height = [("", score) for score in _scores(context)], 0.9 + style.row_height(names) * len(names)
    return _panels(context, folder, "final-scores", panels, panel, SIDE_BY_SIDE, height=height, margin=1.8, sharey=True)


def _scores(context: Context) -> list[int]:
    """Return the available scores, evaluation-mode loss first; bits are drawn as learning curves.

    Raises:
        Missing: There is none.
    """
    scores = context.data.scores
    scores = scores[scores["run"].isin(context.table.index) & (scores["metric"] != "bits")]
    if scores.empty:
        raise Missing(
            f"no final scores in grid {context.grid}; add tasks to `evaluate`, or train.probes, then: "
            f"suite sweep {context.source}"
        )
    return sorted(int(score) for score in scores["score"].unique())


def _title(context: Context, score: int) -> str:
    row = context.titles.loc[score]
    title = "evaluation loss, nats/token" if row["key"] == LOSS else row["title"]
    return f"{title}{arrow(str(row['key']))}"


def _points(context: Context, part: pd.DataFrame, score: int) -> pd.DataFrame:
    """Return the runs that have a score, with it as `value`."""
    scores = context.data.scores
    values = scores.loc[scores["score"] == score].set_index("run")["value"]
    return part.assign(value=values.reindex(part.index)).dropna(subset=["value"])


def _panels(
    context: Context,
    folder: Path,
    name: str,
    panels: Sequence[tuple[str, int]],
    panel: Callable[[Axes, str, int], None],
    note: str,
    columns: int = 3,
    height: float = 2.4,
    margin: float = 0.0,
    sharey: bool = False,
) -> list[Path]:
    """Return a figure of one panel per place and score; scores beyond PANELS panels are named in the footnote.

    Args:
        context: The grid.
        folder: Where the figure is written.
        name: Of the file.
        panels: The place (a base, a cost or nothing) and score of each panel.
        panel: Draws one.
        note: The footnote.
        columns: Panels side by side.
        height: Of a row, inches.
        margin: Width for labels to the left, inches.
        sharey: Whether panels share their vertical axis.
    """
    scores = list(dict.fromkeys(score for _, score in panels))
    room = max(1, PANELS * len(scores) // len(panels))
    if len(scores) > room:
        note += f" Not drawn, because there are too many: {', '.join(_title(context, one) for one in scores[room:])}."
    panels = [(place, score) for place, score in panels if score in scores[:room]]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = max(4.4, margin + 2.6 * columns)
    with style.figure(rows, columns, width, rows * height + 0.6, sharey=sharey) as (drawn, axes):
        for axis, (place, score) in zip(axes, panels, strict=False):
            panel(axis, place, score)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        style.legend_above(drawn, axes)
        return style.save(drawn, folder, name, context.note(f"{note} ↑: higher is better, ↓: lower is better."))


def _imported(axis: Axes, context: Context, score: int) -> None:
    """Draw the score of each imported checkpoint as a line: it was not trained here."""
    imported = context.data.imported
    for row in imported[imported["score"] == score].to_dict("records"):
        axis.axhline(
            row["value"], color="#777777", linewidth=0.8, linestyle=":", label=f"not trained here: {row['name']}"
        )


def _published(axis: Axes, context: Context, base: str, score: int) -> None:
    """Draw published values of the same base, task and metric, by memory rows; each with its family and confidence."""
    published = context.data.published
    if published is None:
        return
    identity = context.titles.loc[score]
    task, metric = printed_as(str(identity["task"]), str(identity["metric"]))
    same = published[(published["base"] == base) & (published["task"] == task)]
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


SCORE_FIGURES: list[tuple[str, Callable[[Context, Path], list[Path]]]] = [
    ("scores-rows", scores_against_rows),
    ("scores-base", scores_against_base),
    ("scores-cost", scores_against_cost),
    ("final-scores", final_scores_figure),
]
