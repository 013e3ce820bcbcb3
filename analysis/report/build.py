"""The report of a grid: what was run, paired differences with dense, fits, figures, failures, versions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparisons.paired import MIN_PAIRS, Contrast, Difference, bits_at, contrasts, final_scores, paired
from analysis.comparisons.trends import trends
from analysis.errors import InputError
from analysis.figures.gallery import CAPTIONS, draw
from analysis.figures.scene import ordered
from analysis.records.frame import load_published
from analysis.records.runs import EQUAL, Run, missing_runs, read_grids, read_runs, read_source, regime, summary
from analysis.records.tables import number, signed
from analysis.report.blocks import Block, Figure, Heading, Items, Table, Text, to_html, to_markdown
from analysis.report.fits import multiplier_blocks, trend_blocks
from analysis.report.formatting import exp_cell, with_interval

UNSTEADY = 1.25
"""Runs of one variant further apart in speed than this were slowed by something else."""


def write(results: Path, grid: str, figures: Path) -> dict[str, Any]:
    """Draw the figures and write results/grids/<grid>/report.md; gives the paths and what is missing."""
    runs = read_runs(results, grid)
    drawn, missing = draw(runs, grid, figures, load_published(results), read_source(results, grid))
    folder = results / "grids" / grid
    pictures = [Figure(paths[0], CAPTIONS.get(name, name)) for name, paths in drawn.items()]
    blocks = build(runs, grid, missing_runs(results, grid), pictures, missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(to_markdown(blocks, folder), encoding="utf-8")
        (folder / "report.html").write_text(to_html(blocks), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    failed = [run.name for run in runs if run.state.get("state") == "failed"]
    paths = {name: [str(path) for path in files] for name, files in drawn.items()}
    return {
        "grid": grid,
        "report": str(folder / "report.md"),
        "page": str(folder / "report.html"),
        "figures": paths,
        "missing": missing,
        "failed": failed,
    }


def build(
    runs: list[Run], grid: str, absent: list[str], pictures: Sequence[Figure], undrawn: Sequence[str]
) -> list[Block]:
    """The report's blocks, in order."""
    table = ordered(summary(runs))
    found = contrasts(runs)
    bios = bool(table["e50_state"].ne("none").any())
    blocks: list[Block] = [Heading(f"Grid {grid}", 1)]
    if bios:
        blocks.append(Text(f"{regime(runs)} E50: exposures at which bits learned (storage) reach half of N H."))
    blocks += _headline(found)
    blocks += list(pictures[:1])
    blocks += [Heading("What was run"), *_what_ran(table, absent)]
    blocks += [Heading("Paired differences with dense"), *_differences(found, bios)]
    if bios:
        blocks += [Heading("Storage, paraphrase and extraction"), *_kinds(table, runs)]
    blocks += [Heading("Final evaluations"), *_finals(table, runs)]
    blocks += [Heading("Fits"), *trend_blocks(trends(runs))]
    blocks += [Heading("Compute multiplier along dense runs"), *multiplier_blocks(runs)]
    blocks += [Heading("Figures"), *pictures[1:], *([Items(list(undrawn))] if undrawn else [])]
    blocks += [Heading("Failures"), *_failures(table, absent)]
    blocks += [Heading("Versions"), *_versions(runs)]
    return blocks


def _headline(found: list[Contrast]) -> list[Block]:
    """The primary contrast in a sentence, whatever its sign."""
    primary = next((contrast for contrast in found if contrast.primary), None)
    if primary is None:
        return [Text("No primary contrast: it needs memory_plus and dense at one base size.")]
    title = "Primary contrast (declared by the grid's plan, before any result)"
    if primary.log_e50 is None:
        return [Text(f"{title}: {_final_headline(primary)}.", lead=True)]
    at = f"{_pairs(len(primary.seeds))}, at {_compute(primary)}"
    if primary.bound == "unknown":
        text = (
            f"{title}: {primary.variant} against {primary.reference} at {primary.base} is undecided, because "
            f"{primary.censored[0]} and {primary.censored[1]} of the runs never reached half of N H; {at}."
        )
        return [Text(text, lead=True)]
    low, high = primary.log_e50.low, primary.log_e50.high
    direction = "fewer" if primary.log_e50.mean < 0 else "more"
    verdict = "no difference is inside the interval" if low <= 0 <= high else direction
    if math.isnan(low) and not primary.bound:
        verdict = f"no verdict below {MIN_PAIRS} pairs"
    text = (
        f"{title}: at {primary.base}, {primary.variant} needs {_ratio_cell(primary)} times the exposures of "
        f"{primary.reference} to learn half of N H ({verdict}), {at}."
    )
    return [Text(text, lead=True)]


def _final_headline(primary: Contrast) -> str:
    """The difference of the first final score, evaluation-mode loss where there is one."""
    against = f"{primary.variant} against {primary.reference} at {primary.base}"
    if not primary.finals:
        return f"{against}; no pair of finished runs ended at the same number of tokens"
    key, found = next(iter(primary.finals.items()))
    score = "final loss in evaluation mode, nats per token" if key == "eval/nll" else key
    return f"{against}: {with_interval(found, sign=True)} in {score}, {_pairs(found.n)}, at {_compute(primary)}"


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"


def _compute(contrast: Contrast) -> str:
    """The compute a comparison is made at, in words."""
    equal = "equal-FLOP" if contrast.equal_flop else "not equal-FLOP"
    return (
        f"{contrast.macs_ratio:.2f}x MACs per token ({equal}), {contrast.params_ratio:.2f}x parameters, "
        f"{contrast.bytes_ratio:.2f}x bytes per token"
    )


def _what_ran(table: pd.DataFrame, absent: list[str]) -> list[Block]:
    """One row per variant: runs, account, ratios to plain dense, speed, exposures, E50."""
    headers = [
        "base",
        "variant",
        "done",
        "parameters",
        "table",
        "MACs/token",
        "x MACs",
        "x parameters",
        "x bytes",
        "tokens/s",
        "wall-clock, s",
        "exposures",
        "E50",
    ]
    rows = []
    for (base, label), group in table.groupby(["base", "label"], sort=False):
        first, done = group.iloc[0], group[group["state"] == "done"]
        rows.append(
            [
                base,
                label,
                f"{len(done)}/{len(group)}",
                number(first["params_total"], 4),
                number(first["params_memory"], 4),
                number(first["macs"], 4),
                *(f"{first[key]:.2f}" for key in ("macs_ratio", "params_ratio", "bytes_ratio")),
                number(done["tokens_per_s"].median()),
                number(done["wall_s"].median()),
                _span(done["epoch"]),
                _e50_cell(done),
            ]
        )
    note = (
        f"Ratios are to the plain dense model of the same base and data; within {EQUAL:.0%} counts as equal. Tokens "
        "per second and wall-clock are medians over runs as they shared the machine. Exposures: where runs ended; they "
        "stop once past half of N H."
    )
    blocks: list[Block] = [Table(headers, rows, left=2), Text(note)]
    warning = _speed_warning(table)
    if warning:
        blocks.append(Text(warning))
    if absent:
        blocks.append(Text(f"Runs of the grid without records: {len(absent)}."))
    return blocks


def _span(values: pd.Series) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    low, high = number(float(known.min())), number(float(known.max()))
    return low if low == high else f"{low} to {high}"


def _e50_cell(done: pd.DataFrame) -> str:
    """Mean E50 with its interval; a lower bound where runs are censored."""
    known = done[done["e50_state"] != "none"]
    if known.empty:
        return "–"
    middle = paired(known["e50"].to_numpy(float))
    censored, early = (int(known["e50_state"].eq(state).sum()) for state in ("censored", "early"))
    if censored or early:
        sign = "≥" if not early else "≤" if not censored else "≈"
        return f"{sign} {number(middle.mean)} ({censored + early} of {len(known)} censored)"
    return with_interval(middle)


def _ratio_cell(contrast: Contrast) -> str:
    """E50 ratio with interval, or the bound that censored runs leave."""
    found = contrast.log_e50
    if found is None:
        return "–"
    ratio = number(math.exp(found.mean))
    if contrast.bound:
        ours, theirs = contrast.censored
        lower, higher = contrast.decided
        words = {"at most": f"≤ {ratio}", "at least": f"≥ {ratio}", "unknown": "unknown"}[contrast.bound]
        return f"{words} (censored: {ours} of ours, {theirs} of dense; {lower} pairs lower, {higher} higher)"
    if math.isnan(found.low):
        return ratio
    return f"{ratio} [{number(math.exp(found.low))}, {number(math.exp(found.high))}]"


def _p_cell(contrast: Contrast) -> str:
    value = contrast.p if contrast.primary else contrast.p_holm
    text = "–" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"
    return f"{text} (primary)" if contrast.primary else text


def _differences(found: list[Contrast], bios: bool) -> list[Block]:
    """Every contrast's outcomes at its ratios of MACs, parameters, bytes and wall-clock."""
    if not found:
        return [Text("No pairs: no dense run shares base size, data and seed with another family's.")]
    compute = ["x MACs", "equal-FLOP", "x parameters", "x bytes", "x tokens/s"]
    blocks: list[Block] = []
    if bios:
        headers = [
            "base",
            "variant",
            "against",
            "pairs",
            "E50 ratio",
            "E50 difference",
            "bits difference",
            "points of N H",
            "at exposure",
            "x MACs",
            "p (Holm)",
        ]
        blocks += [Table(headers, [_bios_row(contrast) for contrast in found], left=3), Text(_HOW_PAIRED)]
        headers = ["base", "variant", "against", *compute, "compute multiplier at E50", "wall-clock to E50, ratio"]
        blocks += [Text("What the same comparisons cost:"), Table(headers, [_cost_row(c) for c in found], left=3)]
        blocks += [Text(_HOW_COSTED)]
    finals: list[list[object]] = [
        [
            c.base,
            c.variant,
            c.reference,
            key,
            diff.n,
            with_interval(diff, 3, sign=True),
            _crossed_cell(c, key),
            *_ratio_cells(c),
            _p_cell(c) if key == next(iter(c.finals)) else "–",
        ]
        for c in found
        for key, diff in c.finals.items()
    ]
    if finals and not bios:
        headers = [
            "base",
            "variant",
            "against",
            "score",
            "pairs",
            "difference",
            "over runs x questions",
            *compute,
            "p (Holm)",
        ]
        blocks += [Text("Final scores where both runs of every pair saw the same number of tokens:")]
        blocks += [Table(headers, finals, left=4), Text(_HOW_CROSSED)]
    return blocks


def _crossed_cell(contrast: Contrast, key: str) -> str:
    if key not in contrast.crossed:
        return "–"
    low, high = contrast.crossed[key]
    return f"[{signed(low)}, {signed(high)}]"


_HOW_CROSSED = (
    "Differences have 95 % t-intervals over pairs of runs, for these questions. Over runs x questions: the same "
    "difference with both as random effects, for other questions of the kind, too; given from "
    f"{MIN_PAIRS} pairs on, for scores of answers that are right or wrong."
)


_HOW_PAIRED = (
    "Paired over seeds (same world, data order and initial shared weights); negative differences and ratios below 1 "
    "mean fewer exposures than dense. Intervals are 95 % t-intervals (ratios: of the mean log), given from "
    f"{MIN_PAIRS} pairs on. Bits are compared at the last exposure that every run of the contrast reached: runs stop "
    "once past half of N H, so the faster family sets it. p: paired t-test of log E50; the primary contrast's is "
    "unadjusted, all others are Holm-adjusted. Where runs are censored (half of N H never reached) there is no "
    "interval: their last exposure stands in, which bounds the ratio, and p is of an exact sign test over pairs "
    "whose direction is certain."
)


def _speed_warning(table: pd.DataFrame) -> str:
    """How unlike the speeds of like runs are, where that is more than noise."""
    speeds = table[table["state"] == "done"].groupby(["base", "label"])["tokens_per_s"]
    spread = float((speeds.max() / speeds.min()).max())
    if not spread > UNSTEADY:
        return ""
    return (
        f"The machine was unsteady: runs of one variant differ in speed by up to {number(spread, 2)} times, so tokens "
        "per second and wall-clock say nothing about variants here; measure them side by side: suite bench step."
    )


_HOW_COSTED = (
    f"MACs, parameters and bytes read per token are counted from the structure; within {EQUAL:.0%} of the "
    "reference's MACs a comparison is called equal-FLOP. Tokens per second and wall-clock are as measured, "
    "cells sharing the machine. Compute multiplier at E50: training FLOPs the reference needs for half of N H over "
    "those the variant needs; it is at this one base size, not along a law over sizes."
)


def _ratio_cells(contrast: Contrast) -> list[str]:
    ratios = (contrast.params_ratio, contrast.bytes_ratio, contrast.speed_ratio)
    return [f"{contrast.macs_ratio:.2f}", "yes" if contrast.equal_flop else "no", *(f"{ratio:.2f}" for ratio in ratios)]


def _bios_row(contrast: Contrast) -> list[object]:
    share = contrast.bits_share
    points = None
    if share is not None:
        points = Difference(100 * share.mean, 100 * share.low, 100 * share.high, share.p, share.n)
    bound = {"at most": "≤ ", "at least": "≥ "}.get(contrast.bound, "")
    difference = "unknown" if contrast.bound == "unknown" else bound + with_interval(contrast.e50, 3, sign=True)
    return [
        contrast.base,
        contrast.variant,
        contrast.reference,
        len(contrast.seeds),
        _ratio_cell(contrast),
        difference,
        with_interval(contrast.bits, 3, sign=True),
        with_interval(points, 3, sign=True),
        number(contrast.exposure),
        f"{contrast.macs_ratio:.2f}",
        _p_cell(contrast),
    ]


def _cost_row(contrast: Contrast) -> list[object]:
    flops = contrast.log_flops
    multiplier = None if flops is None else Difference(-flops.mean, -flops.high, -flops.low, flops.p, flops.n)
    return [
        contrast.base,
        contrast.variant,
        contrast.reference,
        *_ratio_cells(contrast),
        exp_cell(multiplier),
        exp_cell(contrast.log_wall),
    ]


def _kinds(table: pd.DataFrame, runs: list[Run]) -> list[Block]:
    """Shares of N H for the three ways of asking, at each base's common exposure."""
    by_name = {run.name: run for run in runs}
    rows = []
    for base, part in table[(table["state"] == "done") & (table["e50_state"] != "none")].groupby("base", sort=False):
        exposure = min(float(by_name[name].probes["epoch"].iloc[-1]) for name in part["run"])
        for label, group in part.groupby("label", sort=False):
            members = [by_name[name] for name in group["run"]]
            cells = [
                with_interval(paired(_shares(members, kind, exposure)))
                for kind in ("storage", "paraphrase", "extraction")
            ]
            rows.append([base, label, len(members), number(exposure), *cells])
    note = (
        "Share of the probed people's bits that is learned, at the last exposure every run of the base reached. "
        "Storage: templates seen in training; paraphrase: held-out templates; extraction: questions, about people "
        "never asked about in training."
    )
    return [
        Table(["base", "variant", "n", "exposure", "storage", "paraphrase", "extraction"], rows, left=2),
        Text(note),
    ]


def _shares(runs: list[Run], kind: str, exposure: float) -> np.ndarray:
    """Bits over bits_max at an exposure, of the runs that have this kind of probe."""
    known = [run for run in runs if f"{kind}_bits" in run.probes]
    return np.array(
        [
            bits_at(run, exposure, f"{kind}_bits") / float(run.probes[f"{kind}_bits_max"].dropna().iloc[-1])
            for run in known
        ]
    )


def _finals(table: pd.DataFrame, runs: list[Run]) -> list[Block]:
    """Mean of every final score by variant; runs may have ended at different exposures, which the table says."""
    by_name = {run.name: run for run in runs}
    done = table[table["state"] == "done"]
    scores = {name: final_scores(by_name[name]) for name in done["run"]}
    keys = sorted({key for score in scores.values() for key in score if not key.endswith("/bits_max")})
    if not keys:
        return [Text("None yet.")]
    rows = []
    for (base, label), group in done.groupby(["base", "label"], sort=False):
        values = {key: np.array([scores[n][key] for n in group["run"] if key in scores[n]]) for key in keys}
        cells = [with_interval(paired(values[key])) for key in keys]
        rows.append([base, label, len(group), _span(group["tokens"]), *cells])
    note = (
        f"At the end of each run: not at equal exposures where runs stopped early. Intervals from {MIN_PAIRS} runs on."
    )
    return [Table(["base", "variant", "n", "tokens", *keys], rows, left=2), Text(note)]


def _failures(table: pd.DataFrame, absent: list[str]) -> list[Block]:
    bad = table[table["state"] != "done"]
    lines = [
        f"{row['run']}: {row['state']}" + (f": {row['cause']}" if row["cause"] else "") for _, row in bad.iterrows()
    ]
    lines += [f"{name}: not started" for name in absent]
    return [Items(lines)] if lines else [Text("None: every run of the grid is done.")]


def _versions(runs: list[Run]) -> list[Block]:
    """Every set of versions among the runs, with how many runs it made."""
    counts: dict[str, int] = {}
    for run in runs:
        key = json.dumps(run.versions, sort_keys=True)
        counts[key] = counts.get(key, 0) + 1
    lines = []
    for key, count in counts.items():
        versions = ", ".join(f"{name} {value}" for name, value in json.loads(key).items()) or "none recorded"
        lines.append(f"{count} runs: {versions}")
    return [Items(lines)]


def grids(results: Path, grid: str | None) -> list[str]:
    """The grid asked for, or all that have records."""
    if grid is not None:
        return [grid]
    known = list(read_grids(results))
    if not known:
        raise InputError(f"{results / 'grids'}: no grids here; make one: suite sweep smoke")
    return known
