"""The report's fits: log-linear trends, and the compute multiplier along the reference's runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.comparisons.multiplier import Multiplier
from analysis.comparisons.multiplier_grid import Named
from analysis.comparisons.statistics import MIN_PAIRS, Difference
from analysis.comparisons.trends import Trend
from analysis.records.grid_data import GridData
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval


def trend_blocks(trends: Sequence[Trend]) -> list[Block]:
    """Return the log-linear fits with their held-out variant."""
    if not trends:
        return [Text("None: they need runs of a memory family and of the reference.")]
    rows = []
    for trend in trends:
        cells = [
            "not identified" if term in trend.not_identified else _estimate(trend.estimates[term])
            for term in ("ln(1 + M/N)", "ln N")
        ]
        out = trend.held_out
        score = f"{out['cell']}: {100 * float(out['relative_error']):+.1f} %" if out else "too few sizes"
        rows.append([trend.outcome, trend.variant, trend.runs, trend.cells, *cells, score, trend.left_out or "–"])
    headers = ["outcome", "variant", "runs", "sizes", "exponent of 1 + M/N", "exponent of N", "held out: error"]
    note = (
        "ln y = a + b ln(1 + M/N) + c ln N with M table parameters and N non-embedding base parameters, the reference "
        "at M = 0. Least squares over runs, t-intervals from the spread of runs of one size: with few sizes the "
        "interval is conditional on this form, and does not test it. The size with the largest table is predicted "
        "from the others before the fit shown."
    )
    return [Table([*headers, "left out"], rows, left=2, name="trends"), Text(note)]


def _estimate(ends: tuple[float, float, float]) -> str:
    return with_interval(Difference(*ends, p=math.nan, n=1))


def multiplier_blocks(data: GridData, multipliers: Sequence[Named], reasons: Sequence[str]) -> list[Block]:
    """Return what each variant's final loss would cost the reference, by data; or why the grid cannot show it.

    Args:
        data: The grid.
        multipliers: (base, variant, multiplier).
        reasons: Why some data have none.
    """
    if not multipliers:
        return [Text(f"None: {'; '.join(reasons)}.")]
    reference = data.reference
    headers = ["base", "variant", "runs", "training FLOPs", "loss", "multiplier", "extrapolated", "misfit", "refused"]
    rows = [_multiplier_row(base, variant, item) for base, variant, item in multipliers]
    note = (
        f"A power law with offset, final evaluation-mode loss against training FLOPs, is fitted to the envelope of the "
        f"plain {reference} runs of the same data (runs without another one that reaches as low a loss with as little "
        f"compute) and solved at each variant's loss: FLOPs of such a {reference} run over the variant's own. Every "
        f"point is the end of a finished run. Intervals, for {MIN_PAIRS}+ runs of a variant, resample runs on both "
        "sides. Extrapolated: the loss is outside those of the curve. Misfit: root mean square distance, in nats, of "
        "the curve from its own runs; a variant that is closer to the curve than that has no multiplier."
    )
    return [
        Table(headers, rows, left=2, name="multipliers"),
        Text(" ".join([note, *(f"Not for all data: {reason}." for reason in reasons)])),
    ]


def _multiplier_row(base: str, variant: str, item: Multiplier) -> list[object]:
    value = with_interval(Difference(item.value, item.low, item.high, p=math.nan, n=item.runs))
    if item.reason:
        value = "–"
    elif not math.isfinite(item.value):
        value = "beyond the law"
    shown = "yes" if item.extrapolated else "no"
    cells = [base, variant, item.runs, number(item.flops), number(item.outcome, 4), value, shown]
    return [*cells, number(item.misfit, 2), item.reason or "–"]
