"""The report's fits: log-linear trends, and the compute multiplier along the dense runs."""

from __future__ import annotations

import math

from analysis.comparisons.multiplier import Multiplier
from analysis.comparisons.multiplier_grid import multipliers_along_dense
from analysis.comparisons.paired import MIN_PAIRS, Difference
from analysis.comparisons.trends import Trend
from analysis.records.runs import Run
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval


def trend_blocks(found: list[Trend]) -> list[Block]:
    """The log-linear fits with their held-out cell."""
    if not found:
        return [Text("None: they need a memory family beside dense.")]
    rows = []
    for trend in found:
        cells = [
            "not identified" if term in trend.not_identified else _estimate(trend.estimates[term])
            for term in ("ln(1 + M/N)", "ln N")
        ]
        out = trend.held_out
        score = f"{out['cell']}: {100 * float(out['relative_error']):+.1f} %" if out else "too few cells"
        rows.append([trend.outcome, trend.family, trend.runs, trend.cells, *cells, score, trend.left_out or "–"])
    headers = [
        "outcome",
        "family",
        "runs",
        "cells",
        "exponent of 1 + M/N",
        "exponent of N",
        "held out: error",
        "left out",
    ]
    note = (
        "ln y = a + b ln(1 + M/N) + c ln N with M table parameters and N non-embedding base parameters, dense at "
        "M = 0; least squares over runs, t-intervals from the spread of runs within cells (cells are few: the "
        "interval is of this form on these cells, not of the form's truth). The cell with the largest table is "
        "predicted from the others before the fit printed."
    )
    return [Table(headers, rows, left=2), Text(note)]


def _estimate(found: tuple[float, float, float]) -> str:
    return with_interval(Difference(*found, p=float("nan"), n=1))


_HOW_MULTIPLIED = (
    "A power law with offset, final evaluation-mode loss against training FLOPs, fitted to the plain dense runs of the "
    "same data as they are (not along a compute-optimal frontier) and solved at each variant's loss: FLOPs of such a "
    "dense run over the variant's own. No finished run is cut: every point is a run's end. Intervals, from "
    f"{MIN_PAIRS} runs of a variant on, resample runs on both sides. A loss outside the dense runs': extrapolated."
)


def multiplier_blocks(runs: list[Run]) -> list[Block]:
    """What each variant's final loss would have cost dense, by data; or why the grid cannot say."""
    found, reasons = multipliers_along_dense(runs)
    if not found:
        return [Text(f"None: {'; '.join(reasons)}.")]
    headers = ["base", "variant", "runs", "training FLOPs", "loss", "multiplier", "extrapolated"]
    rows = [_multiplier_row(base, variant, item) for base, variant, item in found]
    return [Table(headers, rows, left=2), Text(" ".join([_HOW_MULTIPLIED, *(f"None: {why}." for why in reasons)]))]


def _multiplier_row(base: str, variant: str, item: Multiplier) -> list[object]:
    found = with_interval(Difference(item.value, item.low, item.high, p=math.nan, n=item.runs))
    value = found if math.isfinite(item.value) else "beyond the law"
    marked = "yes" if item.extrapolated else "no"
    return [base, variant, item.runs, number(item.flops), number(item.outcome, 4), value, marked]
