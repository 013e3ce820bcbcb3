"""Where the next parameter goes, as tables and sentences for the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from analysis.comparisons.next_parameter import AXES, Lead, Step, equivalent_size, leads, per_doubling
from analysis.comparisons.paired import E50
from analysis.comparisons.statistics import MIN_PAIRS, Difference
from analysis.records.grid_data import GridData
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval


def unit(metric: str) -> str:
    """Return the unit of a gain."""
    return "doublings of learning speed (log2 of the ratio of E50)" if metric == E50 else f"improvement of {metric}"


def next_blocks(data: GridData, steps: Sequence[Step], metric: str, by: str) -> list[Block]:
    """Return the table of steps along one axis, and a sentence for each base on who gains most where.

    Args:
        data: The grid.
        steps: Every step of the grid.
        metric: What gains are measured in.
        by: An axis of `AXES`.
    """
    noun = AXES[by][1]
    headers = ["base", "destination", "variant", f"{noun}, x base", "gain", "per doubling", "N_eq, x base", "pairs"]
    rows: list[list[object]] = []
    sentences = []
    for base, members in _by_base(steps):
        sizes = equivalent_size(members, data.reference)
        for _, own in groupby(members, key=lambda step: step.destination):
            ordered = sorted(own, key=lambda step: step.doublings[by])
            rates = per_doubling(ordered, by)
            rows += [_row(step, by, rate, sizes.get(step.label)) for step, rate in zip(ordered, rates, strict=True)]
        sentences += [f"{base}: {sentence}" for sentence in lead_sentences(leads(members, by), noun)]
    note = (
        f"Gain: {unit(metric)} over the plain {data.reference} model of the base, paired over seeds, with 95 % "
        f"t-intervals from {MIN_PAIRS} pairs on. Per doubling: gain over the step before it, per doubling of "
        f"{noun}; –: the step adds less than 2 %. N_eq: parameters of a wider {data.reference} model of the same gain."
    )
    return [Table(headers, rows, left=3, name="next"), *map(Text, sentences), Text(note)]


def lead_sentences(found: Sequence[Lead], noun: str) -> list[str]:
    """Return who gains most at which costs, in sentences; consecutive costs of one verdict share one."""
    if not found:
        return [f"no two destinations were measured at the same {noun}, so none can be preferred"]
    sentences = []
    for (leader, decided), group in groupby(found, key=lambda lead: (lead.leader, lead.decided)):
        members = list(group)
        ends = [f"{2**lead.doublings:.3g}" for lead in (members[0], members[-1])]
        where = f"at {ends[0]} times the {noun}" if ends[0] == ends[1] else f"from {' to '.join(ends)} times the {noun}"
        last = members[-1]
        margin = f"{with_interval(last.difference, sign=True)} over {last.runner_up}"
        margin += "" if ends[0] == ends[1] else f" at {ends[1]}"
        pairs = last.difference.n
        if decided:
            sentences.append(f"{where} {leader} gains most ({margin})")
        elif pairs < MIN_PAIRS:
            sentences.append(f"{where} {pairs} pairs are too few for a verdict ({leader} leads by {margin})")
        else:
            sentences.append(f"{where} none can be told to gain most ({leader} leads by {margin})")
    return sentences


def document(data: GridData, steps: Sequence[Step], metric: str, by: str) -> dict[str, Any]:
    """Return what `next --json` prints: steps and leads of every base."""
    bases = []
    for base, members in _by_base(steps):
        sizes = equivalent_size(members, data.reference)
        rates: dict[str, Difference | None] = {}
        for _, own in groupby(members, key=lambda step: step.destination):
            ordered = sorted(own, key=lambda step: step.doublings[by])
            rates |= dict(zip((step.label for step in ordered), per_doubling(ordered, by), strict=True))
        found = leads(members, by)
        bases.append(
            {
                "base": base,
                "steps": [_step_json(step, rates[step.label], sizes.get(step.label)) for step in members],
                "leads": [
                    {
                        "ratio": 2**lead.doublings,
                        "leader": lead.leader,
                        "runner_up": lead.runner_up,
                        "difference": vars(lead.difference),
                        "decided": lead.decided,
                    }
                    for lead in found
                ],
                "sentences": lead_sentences(found, AXES[by][1]),
            }
        )
    return {"grid": data.grid, "metric": metric, "unit": unit(metric), "by": by, "bases": bases}


def _by_base(steps: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    return [(base, list(members)) for base, members in groupby(steps, key=lambda step: step.base)]


def _row(step: Step, by: str, rate: Difference | None, size: Difference | None) -> list[object]:
    ratio = f"{2 ** step.doublings[by]:.3g}" if math.isfinite(step.doublings[by]) else "–"
    pairs = f"{step.gain.n}" + (f" ({step.left_out} without a gain)" if step.left_out else "")
    cells = [with_interval(step.gain, sign=True), with_interval(rate, sign=True), _ratio_cell(size)]
    return [step.base, step.destination, step.label, ratio, *cells, pairs]


def _ratio_cell(size: Difference | None) -> str:
    """Return the ratio whose log2 is the difference; – where the reference's curve does not reach the gain."""
    if size is None:
        return "–"
    mean, low, high = (2**value if math.isfinite(value) else math.nan for value in (size.mean, size.low, size.high))
    return with_interval(Difference(mean, low, high, size.p, size.n))


def _step_json(step: Step, rate: Difference | None, size: Difference | None) -> dict[str, Any]:
    return {
        "destination": step.destination,
        "variant": step.label,
        "amount": dict(step.amount),
        "ratio": {axis: 2**value for axis, value in step.doublings.items()},
        "gain": vars(step.gain),
        "per_doubling": rate and vars(rate),
        "log2_equivalent_size": size and vars(size),
        "left_out": step.left_out,
    }
