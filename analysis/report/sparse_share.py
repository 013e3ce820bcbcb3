"""One sparse budget divided between tables and experts, as a table of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.comparisons.destinations.sparse_share import Budget
from analysis.comparisons.paired import E50
from analysis.comparisons.statistics import MIN_PAIRS, Difference
from analysis.report.blocks import Block, Heading, Table, Text
from analysis.report.formatting import exp_cell, with_interval


def sparse_share_blocks(metric: str, budgets: Sequence[Budget]) -> list[Block]:
    """Return a row per variant of every budget; nothing without a budget.

    Args:
        metric: What gains are measured in.
        budgets: The budgets.
    """
    if not budgets:
        return []
    outcome = "E50 ratio" if metric == E50 else f"improvement of {metric}"
    headers = ["base", "variant", "sparse parameters", "in tables, %", "used by a token", outcome, "pairs"]
    rows: list[list[object]] = []
    for budget in budgets:
        for at, division in enumerate(budget.divisions):
            counts = [f"{division.sparse:,}", f"{100 * division.share:.0f}", f"{division.active:,}"]
            value = "reference" if at == 0 else _cell(division.gain, metric)
            left_out = f" ({division.left_out} without a gain)" if division.left_out else ""
            rows.append([budget.base, division.label, *counts, value, f"{division.gain.n}{left_out}"])
    note = (
        "Sparse: parameters that a token does not use; a budget's variants agree within 2 %. In tables: elements of "
        "value tables over them. Compared with the variant of the least share, paired over seeds, with 95 % "
        f"t-intervals for {MIN_PAIRS}+ pairs. Projections of memories add to what a token uses."
    )
    return [
        Heading("Experts and tables at one sparse budget"),
        Table(headers, rows, left=2, name="sparse-share"),
        Text(note),
    ]


def _cell(gain: Difference, metric: str) -> str:
    """Return the ratio of E50 whose binary logarithm is the negative gain, or the gain itself."""
    if metric != E50:
        return with_interval(gain, sign=True)
    mean, low, high = (-np.log(2) * value for value in (gain.mean, gain.high, gain.low))
    return exp_cell(Difference(mean, low, high, gain.p, gain.n)) if gain.n else "–"
