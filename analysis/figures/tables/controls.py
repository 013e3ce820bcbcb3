"""The figure of controls: exposures that variants with tables and their controls need, relative to the reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.comparisons.statistics import MIN_PAIRS
from analysis.figures import style
from analysis.figures.context import Context, Missing
from analysis.figures.marks import dot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ITSELF = "the variant"
LOOKS = {
    ITSELF: style.Look("#000000", "o", style.SOLID, 1.0, 6.0),
    "one_row": style.Look("#D55E00", "s", style.SOLID, 1.0, 5.0),
    "frozen": style.Look("#0072B2", "D", style.SOLID, 1.0, 5.0),
    "shuffled": style.Look("#009E73", "^", style.SOLID, 1.0, 5.0),
    "dense": style.Look("#8C6D1F", "P", style.SOLID, 1.0, 5.0),
}
"""How a variant and each of its controls are drawn."""


def controls_figure(context: Context, folder: Path) -> list[Path]:
    """Draw E50 over that of the reference, paired over seeds: a row per variant with the marks of its controls."""
    sides = [(c.base, c.variant, c.reference) for c in context.comparisons.controls if not c.bound and c.seeds]
    if not sides:
        raise Missing(
            f"grid {context.grid} has no variant with a control that reached half of N H; add model.control: "
            f"[null, one_row, frozen] to an axis, then: suite sweep {context.source}"
        )
    ratios, runs = _ratios(context), context.data.runs
    controls = dict(zip(runs["label"], runs["control"].fillna(""), strict=True))
    rows = list(dict.fromkeys((base, variant) for base, variant, _ in sides))
    names = style.row_names([f"{base} {variant}" for base, variant in rows])
    height = 1.3 + (0.15 + style.row_height(names)) * len(rows)
    with style.figure(1, 1, width=6.8, height=height) as (drawn, (axis,)):
        for place, (base, variant) in enumerate(rows):
            members = [variant, *(control for at, name, control in sides if (at, name) == (base, variant))]
            for step, label in enumerate(members):
                if (base, label) in ratios:
                    look = LOOKS[controls[label] or ITSELF]
                    dot(axis, place + 0.15 * (step - 2), ratios[base, label], look, sideways=True, ratio=True)
        for name, look in LOOKS.items():
            axis.plot([], [], color=look.color, marker=look.marker, linestyle="none", label=name)
        axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(rows)), names)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        _ratio_axis(axis)
        axis.set_xlabel(f"E50 over that of plain {context.data.reference}")
        style.legend_above(drawn, [axis])
        note = (
            f"A tick per pair of seeds; mark: geometric mean, 95 % t-interval for {MIN_PAIRS}+ pairs. Left of the "
            "dotted line: fewer exposures than the reference. What a table adds is the distance from its controls. "
            "Variants with censored runs are left out."
        )
        return style.save(drawn, folder, "controls", context.note(note, runs=len(context.data.done)))


def _ratio_axis(axis: Axes) -> None:
    """Make the x axis logarithmic with ticks at plain ratios."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0, 3.0, 4.0, 6.0, 10.0]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(NullLocator())


def _ratios(context: Context) -> dict[tuple[str, str], np.ndarray]:
    """Return the E50 ratios of each variant and the plain reference, by pair of seeds: (base, label) -> (pairs,)."""
    plain = [c for c in context.comparisons.contrasts if not c.control and len(c.e50_ratios)]
    ratios: dict[tuple[str, str], list[np.ndarray]] = {}
    for contrast in plain:
        ratios.setdefault((contrast.base, contrast.variant), []).append(contrast.e50_ratios)
    return {key: np.concatenate(values) for key, values in ratios.items()}
