"""One look for every figure: colours that survive colour blindness and print, markers that survive grey.

Colours are those of Okabe and Ito (Color Universal Design, 2008) and of Tol (2021), one per family; a table size is a
shade. Every variant has dashes and a size of marker of its own, so that where marks of several coincide, a part of each
is seen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.records.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "dense": "#000000",
    "moe": "#E69F00",
    "moe_topk": "#D55E00",
    "pkm": "#56B4E9",
    "memory_plus": "#0072B2",
    "peer": "#009E73",
    "ultramem_v2": "#5D3A9B",
    "engram": "#CC79A7",
    "engram_moe": "#B5446E",
    "ngram_embedding": "#8C6D1F",
    "token_table": "#882255",
}
SPARE = ["#7F7F7F", "#44AA99", "#AA4499", "#999933"]
"""Colours of other families, in the order in which they appear."""
MARKERS = {
    "dense": "o",
    "moe": "s",
    "moe_topk": "D",
    "pkm": "^",
    "memory_plus": "v",
    "peer": "P",
    "ultramem_v2": "h",
    "engram": "*",
    "engram_moe": "X",
    "ngram_embedding": "<",
    "token_table": ">",
}
STYLES = ["-", "--", "-.", ":"]
"""Line styles of what is not a variant."""
PERIOD = 12.0
"""Length of a dash and its gap, in line widths."""
SHORTEST = 0.3
"""Dash of the last variant, as a share of the period."""
NAME = 40
"""Characters in a line of the name of a row."""
FORMATS = ("png", "pdf", "svg")
RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 7.5,
    "legend.handlelength": 3.0,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "analysis",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Look:
    """How one variant is drawn."""

    color: str
    marker: str
    linestyle: tuple[float, tuple[float, ...]]
    alpha: float
    size: float


SOLID = (0.0, ())
PLAIN = Look("#7F7F7F", "o", SOLID, 1.0, 4.0)
"""What is drawn without a legend entry."""


def looks(variants: list[tuple[str, str]]) -> dict[str, Look]:
    """Return the look of each label, for (family, label) pairs in drawing order: families by colour and marker, members
    by shade, and all by their dashes and the marker's size.

    The first line is solid and its markers are the largest. Each later one has shorter dashes and smaller markers, and
    is drawn above those before it.
    """
    unknown = [family for family in dict.fromkeys(family for family, _ in variants) if family not in COLOURS]
    colours = COLOURS | {family: SPARE[i % len(SPARE)] for i, family in enumerate(unknown)}
    seen: dict[str, int] = {}
    by_label = {}
    distinct = list(dict.fromkeys(variants))
    for place, (family, label) in enumerate(distinct):
        rank = seen.get(family, 0)
        seen[family] = rank + 1
        alpha = 1.0 if rank == 0 else max(0.5, 1 - 0.2 * rank)
        covered = place / max(1, len(distinct) - 1)
        by_label[label] = Look(colours[family], MARKERS.get(family, "X"), _dashes(covered), alpha, 7 - 3 * covered)
    return by_label


def _dashes(covered: float) -> tuple[float, tuple[float, ...]]:
    """Return the line style of a variant, from 0 (the first: solid) to 1 (the last: the shortest dashes).

    All dashes begin where those of the variants before do, and are shorter.
    """
    dash = PERIOD * (1 - (1 - SHORTEST) * covered)
    return (0.0, (dash, PERIOD - dash)) if covered else SOLID


def row_names(names: list[str]) -> list[str]:
    """Return the names of rows in lines of at most NAME characters."""
    return [textwrap.fill(name, NAME) for name in names]


def row_height(names: list[str]) -> float:
    """Return the height of a row in inches, given the names that `row_names` returns."""
    return max(0.27, 0.05 + 0.13 * max(name.count("\n") + 1 for name in names))


@contextmanager
def figure(
    rows: int, columns: int, width: float = 6.8, height: float = 3.0, **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure without a display, in this style, and its axes in reading order; it is closed afterwards.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Width in inches.
        height: Height in inches.
        options: Further arguments of `matplotlib.pyplot.subplots`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(RC):
        drawn, grid = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options
        )
        try:
            yield drawn, list(grid.flat)
        finally:
            plt.close(drawn)


def legend_above(drawn: Figure, axes: list[Axes]) -> None:
    """Draw one legend for the whole figure over its panels; equal labels once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    room = int(drawn.get_figwidth() * 12)
    labels = [textwrap.fill(label, room - 5) for label in entries]
    columns = max(1, room // (5 + max(map(len, labels))))
    rows = -(-len(labels) // columns) if columns > 1 else sum(label.count("\n") + 1 for label in labels)
    drawn.set_figheight(drawn.get_figheight() + 0.17 * rows)
    drawn.legend(list(entries.values()), labels, loc="outside upper left", ncols=columns)


def log_axis(axis: Axes) -> None:
    """Make the x axis logarithmic without overlapping labels: decades, 1-2-5 for few, plain steps within one."""
    from matplotlib.ticker import (
        EngFormatter,
        LogFormatterSciNotation,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high / low < 5:
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        return
    few = high / low < 50
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    if low >= 0.01 and high <= 1e4:
        axis.xaxis.set_major_formatter("{x:g}")
    elif few:
        axis.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(10, 10)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def save(drawn: Figure, folder: Path, name: str, note: str) -> list[Path]:
    """Write the figure with its footnote as PNG, PDF and SVG; gives the paths.

    Args:
        drawn: The figure.
        folder: Where the files are written.
        name: Name of the files, without suffix.
        note: The footnote.

    Raises:
        InputError: A file cannot be written.
    """
    wrapped = "\n".join(textwrap.wrap(note, int(drawn.get_figwidth() * 19)))
    drawn.supxlabel(wrapped, fontsize=6.5, color="#444444", x=0.01, ha="left")
    drawn.draw_without_rendering()
    if _wrap_labels(drawn):
        drawn.draw_without_rendering()
    drawn.set_layout_engine("none")  # laid out once, not again for every format
    paths = []
    for kind in FORMATS:
        path = folder / f"{name}.{kind}"
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {"Software": None}
        with replacing(path) as temporary:
            drawn.savefig(temporary, format=kind, metadata=metadata)
        paths.append(path)
    return paths


def _wrap_labels(drawn: Figure) -> bool:
    """Break the labels of axes that are longer than their axis into lines; return whether there are any.

    The figure is laid out. Text in mathematical notation is left.
    """
    is_changed = False
    for axis in drawn.axes:
        room = axis.get_window_extent()
        sides = (
            (axis.xaxis.label, axis.xaxis.label.get_window_extent().width, room.width),
            (axis.yaxis.label, axis.yaxis.label.get_window_extent().height, room.height),
        )
        for label, length, longest in sides:
            text = label.get_text()
            if length > longest and "$" not in text:
                characters = max(len(line) for line in text.split("\n"))
                label.set_text(_balanced(text, int(characters * longest / length)))
                is_changed = True
    return is_changed


def _balanced(text: str, longest: int) -> str:
    """Return a text in lines of at most `longest` characters, which are as equal in length as words allow."""
    lines = textwrap.wrap(text, longest, break_long_words=False)
    while len(shorter := textwrap.wrap(text, max(map(len, lines)) - 1, break_long_words=False)) == len(lines):
        lines = shorter
    return "\n".join(lines)
