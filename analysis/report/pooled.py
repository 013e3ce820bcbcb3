"""The primary contrast over several worlds, in a sentence and a table."""

from __future__ import annotations

import math

from analysis.comparisons.pooled import Pooled
from analysis.comparisons.statistics import Difference
from analysis.records.tables import number
from analysis.report.blocks import Block, Table, Text
from analysis.report.formatting import exp_cell, with_interval


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
        f"Every value of {noun} counts equally. Intervals cover the spread between seeds, for these worlds (Welch and "
        "Satterthwaite). Points: difference in the share of bits stored, in percent of all bits, at the last exposure "
        f"that every run reached; over all worlds {_points(result.share)}."
    )
    if not math.isnan(result.same_p):
        note += (
            f" That the ratio is the same in all of them has p = {result.same_p:.2g} (Welch's analysis of variance)."
        )
    headers = [noun, "pairs", "open pairs", "E50 ratio", "sd of ln ratio", "points of N H", "at exposure"]
    rows = [
        [
            world.value,
            world.log_ratio.n,
            world.open,
            exp_cell(world.log_ratio),
            number(world.sd),
            _points(world.share),
            number(world.exposure),
        ]
        for world in result.worlds
    ]
    return [
        Text(f"{title}: {against}: {_verdict(result)}.", lead=True),
        Table(headers, rows, left=1, name="primary-by-world"),
        Text(note),
    ]


def _points(share: Difference) -> str:
    """Return a difference of shares in percent points, with its interval."""
    scaled = Difference(100 * share.mean, 100 * share.low, 100 * share.high, share.p, share.n)
    return "–" if math.isnan(share.mean) else with_interval(scaled, 3, sign=True)


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
