"""Where the next parameter goes, as tables and sentences for the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from analysis.comparisons.destinations.next_parameter import AXES, Lead, Return, Step, returns_by_base
from analysis.comparisons.paired import E50
from analysis.comparisons.statistics import MIN_PAIRS, Difference
from analysis.comparisons.steadiness import why_not_compared
from analysis.records.grid_data import GridData
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import with_interval


def unit(metric: str) -> str:
    """Return the unit of a gain."""
    return "doublings of learning speed (log2 of the ratio of E50)" if metric == E50 else f"improvement of {metric}"


def next_blocks(data: GridData, steps: Sequence[Step], metric: str, by: str) -> list[Block]:
    """Return the table of steps along one axis, and for each base sentences on the destination that gains most.

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
    for base, returns, leads in returns_by_base(steps, data.reference, by):
        rows += [_row(item, by) for item in returns]
        sentences += [f"{base}: {sentence}" for sentence in lead_sentences(leads, noun)]
    note = (
        f"Gain: {unit(metric)} over the plain {data.reference} model of the base, paired over seeds, with 95 % "
        f"t-intervals for {MIN_PAIRS}+ pairs. Per doubling: gain over the step before it, per doubling of "
        f"{noun}; –: the step adds less than 2 %. N_eq: parameters of a wider {data.reference} model of the same gain."
    )
    blocks: list[Block] = [Table(headers, rows, left=3, name="next"), *map(Text, sentences), Text(note)]
    if by == "time" and (reason := why_not_compared(data)) is not None:
        blocks.append(Text(reason))
    return blocks


def lead_sentences(leads: Sequence[Lead], noun: str) -> list[str]:
    """Return one sentence per range of costs with the same verdict: which destination gains most there."""
    if not leads:
        return [f"no two destinations were measured at the same {noun}, so none can be preferred"]
    sentences = []
    for (leader, decided), group in groupby(leads, key=lambda lead: (lead.leader, lead.decided)):
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
            sentences.append(f"{where} no destination leads significantly ({leader} leads by {margin})")
    return sentences


def document(data: GridData, steps: Sequence[Step], metric: str, by: str) -> dict[str, Any]:
    """Return what `next --json` prints: steps and leads of every base.

    Args:
        data: The grid.
        steps: Every step of the grid.
        metric: The metric of gains.
        by: An axis of `AXES`.
    """
    bases = [
        {
            "base": base,
            "steps": [_step_json(item) for item in returns],
            "leads": [_lead_json(lead) for lead in leads],
            "sentences": lead_sentences(leads, AXES[by][1]),
        }
        for base, returns, leads in returns_by_base(steps, data.reference, by)
    ]
    return {"grid": data.grid, "metric": metric, "unit": unit(metric), "by": by, "bases": bases}


def _row(item: Return, by: str) -> list[object]:
    step = item.step
    ratio = f"{2 ** step.doublings[by]:.3g}" if math.isfinite(step.doublings[by]) else "–"
    pairs = f"{step.gain.n}" + (f" ({step.left_out} without a gain)" if step.left_out else "")
    cells = [with_interval(value, sign=True) for value in (step.gain, item.per_doubling)]
    return [step.base, step.destination, step.label, ratio, *cells, _ratio_cell(item.equivalent_size), pairs]


def _ratio_cell(size: Difference | None) -> str:
    """Return the ratio whose log2 is the difference; – where the reference's curve does not reach the gain."""
    if size is None:
        return "–"
    mean, low, high = (2**value if math.isfinite(value) else math.nan for value in (size.mean, size.low, size.high))
    return with_interval(Difference(mean, low, high, size.p, size.n))


def _step_json(item: Return) -> dict[str, Any]:
    step, rate, size = item.step, item.per_doubling, item.equivalent_size
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


def _lead_json(lead: Lead) -> dict[str, Any]:
    fields = vars(lead) | {"ratio": 2**lead.doublings, "difference": vars(lead.difference)}
    return {name: fields[name] for name in ("ratio", "leader", "runner_up", "difference", "decided")}
