"""The cost of a training step against the rows of the table: milliseconds and peak memory, row-wise and dense.

Input: the CSV file that `suite bench step` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.errors import InputError
from analysis.figures import style
from analysis.records.tables import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("family", "base", "memory_rows", "optimizer", "step_ms", "ratio_p50", "peak_bytes")
PANELS = (
    ("step_ms", 1.0, "a training step, ms"),
    ("slowdown", 1.0, "time relative to dense"),
    ("peak_bytes", 2**-20, "peak tensor memory, MiB"),
)
OPTIMIZERS = {"row_wise": ("-", "row-wise"), "dense": ("--", "dense optimizer")}


def step_cost(path: Path, folder: Path) -> list[Path]:
    """Return the figure: a line per family and optimizer, families without a table as dotted levels.

    Raises:
        InputError: A file without the columns needed, or without rows.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    table = read_table(path)
    absent = [column for column in COLUMNS if column not in table]
    if absent or table.empty:
        raise InputError(f"{path}: no {f'column {absent[0]}' if absent else 'rows'}, needed: {', '.join(COLUMNS)}")
    table = table.assign(slowdown=1 / table["ratio_p50"])
    looks = style.looks([(family, family) for family in table["family"]])
    with style.figure(1, len(PANELS), width=7.4, height=3.0) as (drawn, axes):
        for axis, (key, factor, ylabel) in zip(axes, PANELS, strict=True):
            for family, group in table.groupby("family", sort=False):
                _family(axis, str(family), group.assign(y=factor * group[key]), looks[str(family)])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("table rows")
            axis.set_ylabel(ylabel)
        style.legend_above(drawn, axes)
        note = (
            f"Training steps at base {table['base'].iloc[0]}. Milliseconds: medians; time relative to dense: medians "
            "of ratios within rounds in which the models alternated. Memory: weights, gradients, moments, activations. "
            f"Dotted: families without a table. Source: {path.name}."
        )
        return style.save(drawn, folder, "step-cost", note)


def _family(axis: Axes, family: str, group: pd.DataFrame, look: style.Look) -> None:
    if not group["memory_rows"].gt(0).any():
        axis.axhline(float(group["y"].iloc[0]), color=look.color, linestyle=":", linewidth=1.2, label=family)
        return
    for optimizer, (linestyle, name) in OPTIMIZERS.items():
        part = group[group["optimizer"] == optimizer].sort_values("memory_rows")
        axis.plot(
            part["memory_rows"],
            part["y"],
            color=look.color,
            linestyle=linestyle,
            marker=look.marker,
            label=f"{family}, {name}",
        )
