"""The primary contrast over several worlds, in a sentence and a table."""

from __future__ import annotations

import math

from analysis.comparisons.pooled import Pooled
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import exp_cell


def pooled_blocks(result: Pooled, title: str) -> list[Block]:
    """Return the contrast over all worlds, whatever its sign, then world by world.

    Args:
        result: The contrast.
        title: Beginning of the sentence.
    """
    noun = result.over.split(".")[-1]
    values = ", ".join(world.value for world in result.worlds)
    pairs = sum(world.log_ratio.n + world.open for world in result.worlds)
    against = f"{result.treatment} against {result.reference} over {noun} {values} ({pairs} pairs)"
    note = (
        f"Every {noun} counts equally. The interval covers the spread between seeds, for these worlds (Welch and "
        "Satterthwaite)."
    )
    if not math.isnan(result.same_p):
        note += (
            f" That the ratio is the same in all of them has p = {result.same_p:.2g} (Welch's analysis of variance)."
        )
    headers = [noun, "pairs", "open pairs", "E50 ratio", "sd of ln ratio"]
    rows = [
        [world.value, world.log_ratio.n, world.open, exp_cell(world.log_ratio), number(world.sd)]
        for world in result.worlds
    ]
    return [
        Text(f"{title}: {against}: {_verdict(result)}.", lead=True),
        Table(headers, rows, left=1, name="primary-by-world"),
        Text(note),
    ]


def _verdict(result: Pooled) -> str:
    """Return the ratio in words, or why there is none."""
    estimate = result.log_ratio
    if math.isnan(estimate.mean):
        opened = sum(world.open for world in result.worlds)
        reason = "a world has fewer than two pairs"
        if opened:
            reason = f"in {opened} pairs a run did not reach half of N H between two probes"
        return f"no estimate over all worlds, because {reason}"
    verdict = "the interval contains no difference"
    if not estimate.low <= 0 <= estimate.high:
        verdict = "fewer" if estimate.mean < 0 else "more"
    return f"{exp_cell(estimate)} times the exposures to learn half of N H ({verdict})"
