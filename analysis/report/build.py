"""The report of a grid: what was run, paired differences with the reference, fits, figures, failures, versions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.comparisons.direction import arrow, digits
from analysis.comparisons.grid import Comparisons
from analysis.comparisons.knowledge import Learning, learning_of
from analysis.comparisons.statistics import MIN_PAIRS, paired, paired_by_group
from analysis.comparisons.steadiness import why_not_compared
from analysis.errors import InputError
from analysis.figures.context import Context, context
from analysis.figures.gallery import CAPTIONS, draw
from analysis.records.grid_data import DONE, EQUAL, GridData
from analysis.records.regime import regime
from analysis.records.scores import reduced
from analysis.records.tables import number
from analysis.records.writing import write_text
from analysis.report.blocks import Block, Figure, Heading, Items, Table, Text, to_html, to_markdown
from analysis.report.capacity import capacity_blocks
from analysis.report.differences import TITLE, control_blocks, difference_blocks, headline
from analysis.report.fits import multiplier_blocks, trend_blocks
from analysis.report.formatting import documents, with_interval
from analysis.report.knowledge import knowledge_blocks, knowledge_headline
from analysis.report.long_tables import shortened
from analysis.report.pooled import pooled_blocks
from analysis.report.sparse_share import sparse_share_blocks

FAILURES = 50
"""Most failures that are listed one by one."""


def write(data: GridData, folder: Path, figures: Path) -> dict[str, Any]:
    """Draw the figures and write report.md, report.html and the tables that are too long for them.

    Args:
        data: The grid.
        folder: Where the report is written.
        figures: Where the figures are.

    Returns:
        The paths, what is missing, and the runs that failed or are damaged.

    Raises:
        InputError: A file cannot be written.
    """
    plots = context(Comparisons(data))
    drawn, missing = draw(plots, figures)
    pictures = [Figure(paths[0], CAPTIONS.get(name, name)) for name, paths in drawn.items()]
    blocks = build(plots, pictures, missing)
    try:
        blocks = shortened(blocks, folder / "tables")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    write_text(folder / "report.md", to_markdown(blocks, folder))
    write_text(folder / "report.html", to_html(blocks))
    return {
        "grid": data.grid,
        "report": str(folder / "report.md"),
        "page": str(folder / "report.html"),
        "figures": {name: [str(path) for path in files] for name, files in drawn.items()},
        "missing": missing,
        "failed": [*data.runs.loc[data.runs["state"] == "failed", "run"], *data.left_out["run"]],
    }


def build(plots: Context, pictures: Sequence[Figure], missing: Sequence[str]) -> list[Block]:
    """Return the blocks of the report, in order.

    Args:
        plots: The grid, its comparisons, and the labels of the figures.
        pictures: The figures that were drawn.
        missing: A line for each figure that was not.
    """
    data, comparisons = plots.data, plots.comparisons
    contrasts, bios = comparisons.contrasts, bool(data.runs["e50_state"].ne("none").any())
    blocks: list[Block] = [Heading(f"Grid {data.grid}", 1)]
    if bios:
        sentence = "E50 is the number of exposures at which the bits learned (storage) reach half of N H."
        measured = " All probes are of averaged weights." if data.contrast and data.contrast.averaged else ""
        blocks.append(Text(f"{regime(data.runs)} {sentence}{measured}"))
    taught = learning_of(data)
    blocks += [*_primary(comparisons, taught), *pictures[:1]]
    blocks += [Heading("What was run"), *_what_ran(data)]
    blocks += [
        Heading(f"Paired differences with {data.reference}"),
        *difference_blocks(contrasts, bios, plots.drawn_as, why_not_compared(data) is None),
    ]
    if comparisons.controls:
        title = "What the tables add: differences with controls"
        blocks += [Heading(title), *control_blocks(comparisons.controls, bios)]
    blocks += _sparse_shares(comparisons)
    if bios:
        blocks += [Heading("Storage, paraphrase and extraction"), *_kinds(data)]
    blocks += capacity_blocks(data)
    if taught is not None:
        blocks += [Heading("New facts: learning and forgetting"), *knowledge_blocks(taught)]
    blocks += [Heading("Final evaluations"), *_finals(plots)]
    if len(data.tables_off):
        blocks += [Heading("Value tables switched off"), *_tables_off(plots)]
    blocks += [Heading("Fits"), *trend_blocks(comparisons.trends)]
    blocks += [
        Heading(f"Compute multiplier along {data.reference} runs"),
        *multiplier_blocks(data, *comparisons.multipliers),
    ]
    blocks += [Heading("Figures"), *pictures[1:]]
    if missing:
        blocks += [*map(Text, plots.notes_on_missing), Items(list(missing))]
    blocks += [Heading("Failures"), *_failures(data)]
    blocks += [Heading("Versions"), *_versions(data.runs)]
    return blocks


def _primary(comparisons: Comparisons, taught: Learning | None) -> list[Block]:
    """Return the primary contrast: over several worlds, in forgetting, or of two variants."""
    if comparisons.pooled is not None:
        return pooled_blocks(comparisons.pooled, TITLE)
    forgetting = knowledge_headline(comparisons.data, taught)
    if forgetting is not None:
        return [Text(f"{TITLE}: {forgetting}.", lead=True)]
    return headline(comparisons.data, comparisons.contrasts)


def _sparse_shares(comparisons: Comparisons) -> list[Block]:
    """Return the divisions of sparse budgets; nothing without a metric, which the list of missing figures states."""
    try:
        return sparse_share_blocks(*comparisons.sparse_shares)
    except InputError:
        return []


def _what_ran(data: GridData) -> list[Block]:
    """Return one row per variant: runs, account, ratios to the plain reference, speed, exposures, E50."""
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
    for (base, label), group in data.runs.groupby(["base", "label"], sort=False):
        first, done = group.iloc[0], group[group["state"] == DONE]
        rows.append(
            [
                base,
                label,
                f"{len(done)}/{len(group)}",
                number(first["params_total"], 4),
                number(first["params_memory"], 4),
                number(first["macs"], 4),
                *(_ratio(first[key]) for key in ("macs_ratio", "params_ratio", "bytes_ratio")),
                _median(done["tokens_per_s"]),
                _median(done["wall_s"]),
                _span(done["epoch"]),
                _e50_cell(done),
            ]
        )
    note = (
        f"Ratios are to the plain {data.reference} model of the same base and data; within {EQUAL:.0%} counts as "
        "equal. Tokens per second and wall-clock: median over runs (smallest to largest). Exposures: where runs "
        "ended; a run may stop once it is past half of N H."
    )
    blocks: list[Block] = [Table(headers, rows, left=2, name="what-was-run"), Text(note)]
    if len(data.done) and (reason := why_not_compared(data)) is not None:
        blocks.append(Text(reason))
    if len(data.absent):
        blocks.append(Text(f"{len(data.absent)} runs of the grid have no records yet."))
    if len(data.left_out):
        blocks.append(Text(f"{len(data.left_out)} runs are damaged or copies and are left out; see Failures."))
    return blocks


def _ratio(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _median(values: pd.Series) -> str:
    present = values.dropna()
    return number(present.median()) if len(present) < 2 else f"{number(present.median())} ({_span(present)})"


def _span(values: pd.Series) -> str:
    present = values.dropna()
    if present.empty:
        return "–"
    low, high = number(float(present.min())), number(float(present.max()))
    return low if low == high else f"{low} to {high}"


def _e50_cell(done: pd.DataFrame) -> str:
    """Return the mean E50 with its interval; a lower bound where runs are censored."""
    probed = done[done["e50_state"] != "none"]
    if probed.empty:
        return "–"
    middle = paired(probed["e50"].to_numpy(float))
    censored, early = (int(probed["e50_state"].eq(state).sum()) for state in ("censored", "early"))
    if censored or early:
        sign = "≥" if not early else "≤" if not censored else "≈"
        return f"{sign} {number(middle.mean)} ({censored + early} of {len(probed)} censored)"
    return with_interval(middle)


KINDS = ("storage", "paraphrase", "extraction")


def _kinds(data: GridData) -> list[Block]:
    """Return shares of N H for the three kinds of probe, at each base's common exposure."""
    rows = []
    probed = data.done[data.done["e50_state"] != "none"]
    for base, part in probed.groupby("base", sort=False):
        exposure, at = data.common_exposure(part.index), part.index.to_numpy(int)
        shares = {}
        for kind in KINDS:
            most = data.curves(f"{kind}_bits_max").last_y()[at]
            shares[kind] = data.curves(f"{kind}_bits").at(exposure, at) / most
        for label, group in part.assign(**shares).groupby("label", sort=False):
            cells = [with_interval(paired(group[kind].dropna().to_numpy(float))) for kind in KINDS]
            rows.append([base, label, len(group), number(exposure), *cells])
    note = (
        "Share of the probed people's bits that is learned, at the last exposure that every run of the base reached. "
        "Storage: templates seen in training. Paraphrase: held-out templates. Extraction: questions about people whose "
        "questions were not in the training text."
    )
    return [Table(["base", "variant", "n", "exposure", *KINDS], rows, left=2, name="kinds"), Text(note)]


def _finals(plots: Context) -> list[Block]:
    """Return the mean of every final score by variant."""
    data = plots.data
    scores = data.scores[data.scores["run"].isin(data.done.index)]
    if scores.empty:
        return [Text("None yet.")]
    scores = scores.assign(**{key: data.runs[key].to_numpy()[scores["run"]] for key in ("base", "label")})
    group = scores.groupby(["base", "label", "score"]).ngroup().to_numpy(int)
    means = paired_by_group(scores["value"].to_numpy(float), group, int(group.max()) + 1)
    place = scores.assign(group=group).drop_duplicates("group")[["base", "label", "score", "group"]]
    cells = {(base, label, score): means[at] for base, label, score, at in place.itertuples(index=False)}
    titles = plots.titles.loc[sorted(scores["score"].unique())]
    rows = []
    for (base, label), runs in data.done.groupby(["base", "label"], sort=False):
        values = [cells.get((base, label, score)) for score in titles.index]
        texts = [
            with_interval(mean, digits(key)) + (f" (n={mean.n})" if mean is not None and mean.n != len(runs) else "")
            for mean, key in zip(values, titles["key"], strict=True)
        ]
        rows.append([base, label, len(runs), _span(runs["tokens"]), *texts])
    columns = [
        ", ".join([f"{key}{arrow(key)}", *([] if math.isnan(n) else [_setting(key, few_shot, n)]), *reduced(precision)])
        for key, few_shot, n, precision in zip(
            titles["key"], titles["few_shot"], titles["n"], titles["precision"], strict=True
        )
    ]
    note = (
        f"At the end of each run, not at equal exposures where runs stopped early. Intervals for {MIN_PAIRS}+ runs. "
        "n: runs of the variant, or, in parentheses, those that have the score. A column holds one score: the same "
        "task version, prompts, few-shot examples, questions, data and precision; the number of questions is in "
        "its header. ↑: higher is better, ↓: lower is better."
    )
    table = Table(["base", "variant", "n", "tokens", *columns], rows, left=2, name="final-evaluations")
    return [table, Text(note)]


def _tables_off(plots: Context) -> list[Block]:
    """Return the mean of every score with and without value tables, by variant, and their paired difference."""
    data = plots.data
    table = data.tables_off[data.tables_off["run"].isin(data.done.index)]
    rows, titles = [], dict(plots.titles["title"])
    for (base, label), runs in data.done.groupby(["base", "label"], sort=False):
        of_variant = table[table["run"].isin(runs.index)]
        for score, part in of_variant.groupby("score", sort=True):
            on, off = part["value"].to_numpy(float), part["off"].to_numpy(float)
            means = [with_interval(paired(values)) for values in (on, off, off - on)]
            rows.append([base, label, titles[score], len(part), *means])
    note = (
        "Off: every row of the tables reads as zeros while the finished model is scored, on the same documents and "
        "prompts. The difference shows how much a model relies on its table, not what training without one would give."
    )
    headers = ["base", "variant", "score", "n", "on", "off", "off - on"]
    return [Table(headers, rows, left=3, name="tables-off"), Text(note)]


def _setting(key: str, few_shot: float, n: float) -> str:
    return documents(key, n) if math.isnan(few_shot) else f"{few_shot:.0f}-shot, {documents(key, n)}"


def _failures(data: GridData) -> list[Block]:
    unfinished = data.runs[data.runs["state"] != DONE]
    lines = [
        f"{run}: {state}" + (f": {cause}" if isinstance(cause, str) and cause else "")
        for run, state, cause in zip(unfinished["run"], unfinished["state"], unfinished["cause"], strict=True)
    ]
    lines = [f"{run}: {cause}" for run, cause in data.left_out.itertuples(index=False)] + lines
    lines += [f"{name}: not started" for name in data.absent]
    if len(lines) > FAILURES:
        lines = [*lines[:FAILURES], f"and {len(lines) - FAILURES:,} more"]
    return [Items(lines)] if lines else [Text("None: every run of the grid is done.")]


def _versions(runs: pd.DataFrame) -> list[Block]:
    """Return every set of versions among the runs, with how many runs it made."""
    lines = []
    for key, count in runs["versions"].value_counts(sort=False).items():
        versions = ", ".join(f"{name} {value}" for name, value in json.loads(str(key)).items()) or "none recorded"
        lines.append(f"{count} runs: {versions}")
    return [Items(lines)]
