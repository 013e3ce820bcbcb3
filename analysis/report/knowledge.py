"""The report on new facts: what each setting learned and forgot, and methods at equal learning."""

from __future__ import annotations

import math

from analysis.comparisons.knowledge import LEVEL, METRIC, Compared, Learning
from analysis.comparisons.statistics import MIN_PAIRS, paired
from analysis.records.grid_data import GridData
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval

COLUMNS = {
    "gain_storage": "gain, taught templates",
    "gain_paraphrase": "gain, unseen templates",
    "gain_extraction": "gain, questions",
    "recall_storage": "recall",
    "recall_paraphrase": "recall, unseen",
    "recall_extraction": "recall, questions",
    "forgotten": "forgotten",
    "known_recall": "known recall",
    "touched": "rows updated",
}


def knowledge_blocks(learning: Learning) -> list[Block]:
    """Return a table of all settings, and one of methods at equal learning."""
    rows = []
    for (method, label), group in learning.final.groupby(["method", "label"], sort=False):
        cells = [with_interval(paired(group[key].dropna().to_numpy(float))) for key in COLUMNS]
        rows.append([method, label, len(group), *cells])
    note = (
        f"After the last fact. Gains: bits per fact since before the first one. Forgotten: {learning.forgotten_unit}. "
        f"Intervals from {MIN_PAIRS} seeds on."
    )
    settings = Table(["method", "setting", "n", *COLUMNS.values()], rows, left=2, name="new-facts")
    return [settings, Text(note), _at_equal_learning(learning), Text(_how_compared(learning))]


def _at_equal_learning(learning: Learning) -> Table:
    rows = []
    for method, part in learning.final.groupby("method", sort=False):
        values = learning.forgetting(part, learning.level)
        reached = values.dropna()
        rows.append([method, len(values), len(values) - len(reached), with_interval(paired(reached.to_numpy(float)))])
    headers = ["method", "seeds", "seeds below the level", "forgotten at the level"]
    return Table(headers, rows, name="equal-learning")


def _how_compared(learning: Learning) -> str:
    return (
        f"Forgetting on each method's hull (of its settings at one seed, and of doing nothing) at a gain of "
        f"{number(learning.level)} bits per fact, {LEVEL:.0%} of a fact's bits where these are known. A method none of "
        "whose settings gains as much at a seed has no value there."
    )


def knowledge_headline(data: GridData, learning: Learning | None) -> str | None:
    """Return the primary contrast on forgetting in a sentence; None if the grid declares another or none."""
    contrast = data.contrast
    if contrast is None or contrast.metric != METRIC:
        return None
    sides = []
    if learning is not None:
        names = data.runs["run"].reindex(learning.final["run"]).to_numpy()
        sides = [learning.final[[name in side for name in names]] for side in (contrast.treatment, contrast.reference)]
    if learning is None or any(side.empty for side in sides):
        return (
            f"{len(contrast.treatment)} runs against {len(contrast.reference)}, on forgetting: no pair is finished yet"
        )
    compared = learning.compare(*sides)
    ours, theirs = (", ".join(dict.fromkeys(side["method"])) for side in sides)
    return f"{ours} against {theirs}: {_sentence(compared, learning)}"


def _sentence(compared: Compared, learning: Learning) -> str:
    difference = compared.difference
    short = (
        f"; {compared.short} and {compared.short_reference} of {compared.pairs} seeds learn less"
        if compared.short or compared.short_reference
        else ""
    )
    if difference.n == 0:
        return f"no seed at which both gain {number(learning.level)} bits per fact{short}"
    verdict = f"no verdict below {MIN_PAIRS} pairs"
    if not math.isnan(difference.low):
        verdict = "the interval contains no difference" if difference.low <= 0 <= difference.high else "forgets less"
        verdict = "forgets more" if difference.low > 0 else verdict
    return (
        f"{with_interval(difference, sign=True)} in the {learning.forgotten_unit} at an equal gain of "
        f"{number(learning.level)} bits per fact ({verdict}), {difference.n} pairs{short}"
    )
