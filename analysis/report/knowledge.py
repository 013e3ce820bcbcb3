"""The report on new facts: what each setting learned and forgot, and methods at equal learning."""

from __future__ import annotations

import math

from analysis.comparisons.knowledge import LEVEL, METRIC, Compared, Learning
from analysis.comparisons.statistics import MIN_PAIRS, paired
from analysis.records.grid_data import GridData
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval

COLUMNS = {
    "learned": "learned",
    "bits_storage": "bits, taught templates",
    "bits_paraphrase": "bits, unseen templates",
    "bits_extraction": "bits, questions",
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
        "After the last fact, means over all facts. Bits of a fact: 0 for a model that knows only the possible "
        f"answers, negative for one that is certain of a wrong one. Forgotten: {learning.forgotten_unit}. "
        f"Intervals for {MIN_PAIRS}+ seeds."
    )
    settings = Table(["method", "setting", "n", *COLUMNS.values()], rows, left=2, name="new-facts")
    return [settings, Text(note), _at_equal_learning(learning), Text(_how_compared(learning))]


def _at_equal_learning(learning: Learning) -> Table:
    rows = []
    for method, part in learning.final.groupby("method", sort=False):
        values = learning.forgetting(part)
        reached = values.dropna()
        rows.append([method, len(values), len(values) - len(reached), with_interval(paired(reached.to_numpy(float)))])
    headers = ["method", "seeds", "seeds below the level", "forgotten at the level"]
    return Table(headers, rows, name="equal-learning")


def _how_compared(learning: Learning) -> str:
    return (
        "Learned: the share of the bits that the model lacked about the facts and gained. Compared: the "
        f"{learning.forgotten_unit} on each method's hull (of its settings at one seed, and of doing nothing) where it "
        f"has learned {LEVEL:g}. A method none of whose settings learns as much at a seed has no value there."
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
        return f"no seed at which both learn {LEVEL:g} of the lacking bits{short}"
    verdict = f"no verdict below {MIN_PAIRS} pairs"
    if not math.isnan(difference.low):
        verdict = "the interval contains no difference" if difference.low <= 0 <= difference.high else "forgets less"
        verdict = "forgets more" if difference.low > 0 else verdict
    return (
        f"{with_interval(difference, sign=True)} in the {learning.forgotten_unit} where both have learned "
        f"{LEVEL:g} of the lacking bits ({verdict}), {difference.n} pairs{short}"
    )
