"""The report's fits: log-linear trends, and the compute multiplier along the dense runs."""

from __future__ import annotations

import json
import math

import pandas as pd

from analysis.compare import MIN_PAIRS, Difference
from analysis.document import Block, Table, Text
from analysis.errors import InputError
from analysis.multiplier import Multiplier, multipliers
from analysis.runs import Run, summary
from analysis.scene import ordered
from analysis.tables import number
from analysis.trends import Trend
from analysis.words import with_interval


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
    headers = ["outcome", "family", "runs", "cells", "exponent of 1 + M/N", "exponent of N", "held out: error",
               "left out"]  # fmt: skip
    note = (
        "ln y = a + b ln(1 + M/N) + c ln N with M table parameters and N non-embedding base parameters, dense at "
        "M = 0; least squares over runs, intervals from runs resampled within cells (cells themselves are few: the "
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
    f"{MIN_PAIRS} runs of a variant on, resample runs on both sides. Better than every dense run: extrapolated."
)


def multiplier_blocks(runs: list[Run]) -> list[Block]:
    """What each variant's final loss would have cost dense, by data; or why the grid cannot say."""
    table = ordered(summary(runs))
    table = table[(table["state"] == "done") & table["eval_loss"].gt(0) & table["train_flops"].gt(0)]
    cells = {run.name: run.cell for run in runs}
    if any(cells[name].get("train", {}).get("stop_past") for name in table["run"]):
        return [Text("None: runs stop by what they have learned, so their final loss does not answer to a budget.")]
    table = table.assign(cell=table["base"] + " " + table["label"], C=table["train_flops"], y=table["eval_loss"])
    rows: list[list[object]] = []
    reasons = []
    for _, part in table.groupby(table["pairing"].map(_data), sort=False):
        plain = part["family"].eq("dense") & ~part["reshaped"]
        try:
            rows += [_multiplier_row(part, item) for item in multipliers(part[plain], part[~plain])]
        except InputError as error:
            reasons.append(f"None: {error}.")
    if not rows:
        return [Text(" ".join(dict.fromkeys(reasons)) or "None: no finished run has a final loss.")]
    headers = ["base", "variant", "runs", "training FLOPs", "loss", "multiplier", "extrapolated"]
    return [Table(headers, rows, left=2), Text(" ".join([_HOW_MULTIPLIED, *dict.fromkeys(reasons)]))]


def _data(pairing: str) -> str:
    """The data of a pairing, whatever the base."""
    return json.dumps(json.loads(pairing)[1])


def _multiplier_row(part: pd.DataFrame, item: Multiplier) -> list[object]:
    first = part[part["cell"] == item.cell].iloc[0]
    known = item.runs >= MIN_PAIRS
    ends = (item.low, item.high) if known else (math.nan, math.nan)
    found = with_interval(Difference(item.value, *ends, p=math.nan, n=item.runs))
    value = found if math.isfinite(item.value) else "beyond the law"
    marked = "yes" if item.extrapolated else "no"
    return [first["base"], first["label"], item.runs, number(item.flops), number(item.outcome, 4), value, marked]
