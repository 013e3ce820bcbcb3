"""Kernels against their memory: bytes that must move per second, and the measured copy bandwidth.

Table reads and row updates do few operations per byte, far left of any machine's ridge, so bandwidth alone is the roof.
Product-key search moves little and computes much, so it and a layer that contains it are drawn without a roof.
Input: the CSV files that `python -m kernels.bench --out DIR` writes, one per device. Above the roof means that a cache
helps: bytes are counted as if each lookup came from memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.figures import style
from analysis.figures.step_cost import step_cost
from analysis.records.tables import read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "operator",
    "contender",
    "device",
    "use",
    "width",
    "rows",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "bytes",
    "gb_per_s",
    "copy_share",
)
TITLES = {
    "forward": "weighted bags, forward",
    "step": "backward and update",
    "search": "product-key search",
    "layer": "whole layer, both ways",
}
COMPUTE_BOUND = ("search", "layer")
LOOKS = [("#0072B2", "o"), ("#000000", "s"), ("#E69F00", "^"), ("#009E73", "D"), ("#CC79A7", "v")]


def draw(bench: Path, folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Draw a figure for every `kernels-<device>.csv` in `bench` and one for `step.csv`.

    Returns:
        Name -> files, and a line for each missing figure with the command that makes it possible.

    Raises:
        InputError: A file without the columns needed, or with values that are not above 0.
    """
    tables, steps = sorted(bench.glob("kernels-*.csv")), bench / "step.csv"
    drawn = {f"kernel-roofline-{path.stem.removeprefix('kernels-')}": roofline(path, folder) for path in tables}
    missing = []
    if not tables:
        make = f"python -m kernels.bench --out {bench}"
        missing.append(f"kernel-roofline: no kernels-*.csv in {bench}; make it: {make}")
    if steps.exists():
        drawn["step-cost"] = step_cost(steps, folder)
    else:
        missing.append(f"step-cost: no step.csv in {bench}; make it: suite bench step --results {bench.parent}")
    return drawn, missing


def roofline(path: Path, folder: Path) -> list[Path]:
    """Return one device's figure: a column per operator, a row of panels per use and width."""
    table = _read(path)
    operators = [name for name in TITLES if name in set(table["operator"])]
    uses = sorted({(str(use), int(width)) for use, width in zip(table["use"], table["width"], strict=True)})
    size = {"width": max(3.6, 2.5 * len(operators)), "height": 2.2 * len(uses) + 0.4}
    with style.figure(len(uses), len(operators), sharex=True, sharey="col", **size) as (drawn, axes):
        for position, axis in enumerate(axes):
            (use, width), operator = uses[position // len(operators)], operators[position % len(operators)]
            part = table[(table["operator"] == operator) & (table["use"] == use) & (table["width"] == width)]
            _panel(axis, part, operator)
            axis.set_title(f"{TITLES[operator]}\n{use} reads, width {width}", loc="left")
            if position % len(operators) == 0:
                axis.set_ylabel("GB/s that must move")
            if position >= len(axes) - len(operators):
                axis.set_xlabel("table rows")
        style.legend_above(drawn, axes)
        note = (
            "Points: median over rounds, bars from p20 to p80. Dashed: copy bandwidth measured in the same run, read "
            "and written, the roof of work that moves each byte once; above it, caches help. Search is bound by "
            f"arithmetic and has no such roof. SparseAdam is a different "
            f"optimizer. Source: {path.name}, device {table['device'].iloc[0]}."
        )
        return style.save(drawn, folder, f"kernel-roofline-{path.stem.removeprefix('kernels-')}", note)


def _read(path: Path) -> pd.DataFrame:
    table = read_table(path)
    absent = [column for column in COLUMNS if column not in table]
    if absent:
        raise InputError(f"{path}: no column {absent[0]}, needed: {', '.join(COLUMNS)}")
    for column in COLUMNS[4:]:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        invalid = ~(np.isfinite(values) & (values > 0))
        if invalid.any():
            bad = table[column].iloc[int(invalid.argmax())]
            raise InputError(f"{path}: column {column}: got {bad}, allowed: numbers above 0")
    shown = table[table["operator"].isin(TITLES)]
    if shown.empty:
        raise InputError(f"{path}: column operator: got {table['operator'].iloc[0]!r}, allowed: {', '.join(TITLES)}")
    return shown


def _panel(axis: Axes, part: pd.DataFrame, operator: str) -> None:
    """Draw one operator: a line per contender over table sizes, and the roof."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    other = 0
    for contender, group in part.groupby("contender", sort=False):
        other += contender != "ours"
        color, marker = LOOKS[0] if contender == "ours" else LOOKS[1 + (other - 1) % (len(LOOKS) - 1)]
        ordered = group.sort_values("rows")
        low, middle, high = (1e-6 * ordered["bytes"] / ordered[f"{name}_ms"] for name in ("p80", "p50", "p20"))
        named = "ours" if contender == "ours" else f"{contender} ({operator})"
        axis.errorbar(
            ordered["rows"],
            middle,
            yerr=[middle - low, high - middle],
            color=color,
            marker=marker,
            capsize=2,
            label=named,
        )
    if len(part) and operator not in COMPUTE_BOUND:
        roof = float((part["gb_per_s"] / part["copy_share"]).median())
        axis.axhline(roof, color="#888888", linewidth=1, linestyle="--", label="copy bandwidth")
