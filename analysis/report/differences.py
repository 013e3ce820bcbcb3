"""The report's primary contrast, and its tables of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.comparisons.direction import arrow
from analysis.comparisons.paired import E50, Contrast, ScoreDifference
from analysis.comparisons.statistics import MIN_PAIRS, Difference
from analysis.records.grid_data import EQUAL, GridData
from analysis.records.scores import LOSS, reduced
from analysis.records.tables import number, signed
from analysis.report.blocks import Block, Items, Table, Text
from analysis.report.formatting import documents, exp_cell, with_interval

TITLE = "Primary contrast (declared by the grid before any run)"
MANY = 60
"""Contrasts beyond this number are also summarised by family and table size."""
UNPAIRED = 30
"""Most lines about scores that could not be paired."""


def headline(data: GridData, contrasts: Sequence[Contrast]) -> list[Block]:
    """Return the primary contrast in a sentence, whatever its sign."""
    if data.contrast is None:
        return [
            Text(
                "The grid declares no primary contrast, so every comparison below is one of many: all p-values are "
                "adjusted by Holm's method. To declare one before the next sweep: `contrast:` in the grid's file."
            )
        ]
    primary = next((contrast for contrast in contrasts if contrast.primary), None)
    if primary is None or not primary.seeds:
        sides = " against ".join(f"{', '.join(side)}" for side in (data.contrast.treatment, data.contrast.reference))
        return [Text(f"{TITLE}: {sides}, on {data.contrast.metric}. No pair of runs is finished yet.", lead=True)]
    if primary.metric != E50:
        return [Text(f"{TITLE}: {_final_sentence(primary)}.", lead=True)]
    return [Text(f"{TITLE}: {_e50_sentence(primary)}.", lead=True)]


def _e50_sentence(primary: Contrast) -> str:
    """Return the ratio of exposures in words."""
    at = f"{_pairs(len(primary.seeds))}, at {_compute(primary)}"
    if primary.log_e50 is None:
        return f"{primary.variant} against {primary.reference} at {primary.base} has no E50; {at}"
    if primary.bound == "unknown":
        return (
            f"{primary.variant} against {primary.reference} at {primary.base} is undecided, because "
            f"{primary.censored[0]} and {primary.censored[1]} of the runs never reached half of N H; {at}"
        )
    low, high = primary.log_e50.low, primary.log_e50.high
    direction = "fewer" if primary.log_e50.mean < 0 else "more"
    verdict = "the interval contains no difference" if low <= 0 <= high else direction
    if math.isnan(low) and not primary.bound:
        verdict = f"no verdict below {MIN_PAIRS} pairs"
    return (
        f"at {primary.base}, {primary.variant} needs {_ratio_cell(primary)} times the exposures of "
        f"{primary.reference} to learn half of N H ({verdict}), {at}"
    )


def _final_sentence(primary: Contrast) -> str:
    """Return the difference of the declared score."""
    against = f"{primary.variant} against {primary.reference} at {primary.base}"
    score = primary.final
    if score is None:
        return f"{against}; no pair of finished runs has the same {primary.metric} at the same number of tokens"
    name = "final loss in evaluation mode, nats per token" if score.key == LOSS else _named(score)
    difference = with_interval(score.difference, sign=True)
    return f"{against}: {difference} in {name}, {_pairs(score.difference.n)}, at {_compute(primary)}"


def _named(score: ScoreDifference) -> str:
    terms = [] if math.isnan(score.few_shot) else [f"{score.few_shot:.0f}-shot"]
    terms += [documents(score.key, score.n), *reduced(score.precision)]
    return score.key if math.isnan(score.n) else f"{score.key} ({', '.join(terms)})"


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"


def _compute(contrast: Contrast) -> str:
    """Return the compute that a comparison is made at, in words."""
    equal = "equal-FLOP" if contrast.equal_flop else "not equal-FLOP"
    return (
        f"{contrast.macs_ratio:.2f}x MACs per token ({equal}), {contrast.params_ratio:.2f}x parameters, "
        f"{contrast.bytes_ratio:.2f}x bytes per token"
    )


def difference_blocks(
    contrasts: Sequence[Contrast], bios: bool, pooled: Mapping[str, str], with_speeds: bool
) -> list[Block]:
    """Return every contrast's outcomes at its ratios of MACs, parameters, bytes and wall-clock.

    Args:
        contrasts: All of a grid.
        bios: Whether E50 is measured.
        pooled: Variant -> the label under which many variants are summarised.
        with_speeds: Whether speeds that were measured compare variants.
    """
    if not contrasts:
        return [Text("No pairs: no run of the reference shares base size, data and seed with another family's.")]
    compute = ["x MACs", "equal-FLOP", "x parameters", "x bytes", *(["x tokens/s"] if with_speeds else [])]
    names = ["base", "variant", "against"]
    blocks: list[Block] = []
    if bios:
        if len(contrasts) > MANY:
            blocks += _summary(contrasts, pooled)
        headers = [*names, "pairs", "E50 ratio", "E50 difference", "bits difference", "points of N H", "at exposure"]
        headers += ["x MACs", "p (Holm)"]
        rows = [_bios_row(contrast) for contrast in contrasts]
        blocks += [Table(headers, rows, left=3, name="differences"), Text(HOW_PAIRED)]
        headers = [*names, *compute, "compute multiplier at E50"]
        headers += ["wall-clock to E50, ratio"] if with_speeds else []
        table = Table(headers, [_cost_row(contrast, with_speeds) for contrast in contrasts], left=3, name="costs")
        blocks += [Text("What the same comparisons cost:"), table, Text(HOW_COSTED)]
    finals = [_final_row(contrast, score, with_speeds) for contrast in contrasts for score in contrast.finals]
    if finals and not bios:
        headers = [*names, "score", "few-shot", "questions", "pairs", "difference", "over runs x questions"]
        table = Table([*headers, *compute, "p (Holm)"], finals, left=4, name="final-differences")
        blocks += [Text("Final scores, where both runs of every pair saw the same number of tokens:")]
        blocks += [table, Text(HOW_CROSSED)]
    return [*blocks, *_unpaired(contrasts)]


def control_blocks(contrasts: Sequence[Contrast], bios: bool) -> list[Block]:
    """Return what each variant's tables add: its paired differences with its own controls."""
    names = ["base", "variant", "against", "pairs"]
    if bios:
        headers = [*names, "E50 ratio", "E50 difference", "bits difference", "points of N H", "at exposure", "x MACs"]
        rows = [_bios_row(contrast)[:-1] for contrast in contrasts]
        return [Table(headers, rows, left=3, name="controls"), Text(HOW_CONTROLLED)]
    headers = [*names[:3], "score", "few-shot", "questions", "pairs", "difference", "over runs x questions"]
    finals = [_final_row(contrast, score, False)[:9] for contrast in contrasts for score in contrast.finals]
    return [Table(headers, finals, left=4, name="controls"), Text(HOW_CONTROLLED)]


def _summary(contrasts: Sequence[Contrast], pooled: Mapping[str, str]) -> list[Block]:
    """Summarise E50 ratios by base, family and table size."""
    groups: dict[tuple[str, str, bool], list[Contrast]] = {}
    for contrast in contrasts:
        if contrast.log_e50 is not None and contrast.bound != "unknown":
            key = (contrast.base, pooled.get(contrast.variant, contrast.variant), contrast.control)
            groups.setdefault(key, []).append(contrast)
    rows = []
    for (base, label, control), members in groups.items():
        ratios = np.exp([contrast.log_e50.mean for contrast in members if contrast.log_e50])
        low, middle, high = (number(value) for value in np.quantile(ratios, [0.1, 0.5, 0.9]))
        significant = sum((contrast.p if contrast.primary else contrast.p_holm) < 0.05 for contrast in members)
        against = "equal-MAC control" if control else "plain reference"
        rows.append([base, label, against, len(members), f"{middle} ({low} to {high})", significant])
    headers = ["base", "variants", "against", "contrasts", "E50 ratio", "p < 0.05 (Holm)"]
    return [
        Text("By family and table size: the median of the contrasts' E50 ratios, with the middle 80 % of them."),
        Table(headers, rows, left=3, name="differences-by-family"),
    ]


def _unpaired(contrasts: Sequence[Contrast]) -> list[Block]:
    """Return what both runs of a pair were scored on, but not in the same way."""
    lines = [
        f"{contrast.base}, {contrast.variant} against {contrast.reference}: {score.key}, seeds "
        f"{', '.join(map(str, score.seeds))}: {_sides(score.ours, score.theirs)}"
        for contrast in contrasts
        for score in contrast.unpaired
    ]
    if not lines:
        return []
    shown = lines[:UNPAIRED]
    if len(lines) > UNPAIRED:
        shown.append(f"and {len(lines) - UNPAIRED:,} more")
    return [
        Text(
            "Not paired, because the two runs were not scored on the same thing (task version, prompts, few-shot "
            "examples, limit, questions or data differ):"
        ),
        Items(shown),
    ]


def _sides(ours: str, theirs: str) -> str:
    same = ours == theirs
    return f"{ours} on both sides, but other prompts, version or data" if same else f"{ours} against {theirs}"


def _final_row(contrast: Contrast, score: ScoreDifference, with_speeds: bool) -> list[object]:
    crossed = "–"
    if score.crossed is not None:
        crossed = f"[{signed(score.crossed[0])}, {signed(score.crossed[1])}]"
    return [
        contrast.base,
        contrast.variant,
        contrast.reference,
        ", ".join([f"{score.key}{arrow(score.key)}", *reduced(score.precision)]),
        "–" if math.isnan(score.few_shot) else f"{score.few_shot:.0f}",
        "–" if math.isnan(score.n) else f"{score.n:,.0f}",
        score.difference.n,
        with_interval(score.difference, 3, sign=True),
        crossed,
        *_ratio_cells(contrast, with_speeds),
        _p_cell(contrast) if score is contrast.final else "–",
    ]


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


def _cost_row(contrast: Contrast, with_speeds: bool) -> list[object]:
    flops = contrast.log_flops
    multiplier = None if flops is None else Difference(-flops.mean, -flops.high, -flops.low, flops.p, flops.n)
    return [
        contrast.base,
        contrast.variant,
        contrast.reference,
        *_ratio_cells(contrast, with_speeds),
        exp_cell(multiplier),
        *([exp_cell(contrast.log_wall)] if with_speeds else []),
    ]


def _ratio_cell(contrast: Contrast) -> str:
    """Return the E50 ratio with its interval, or the bound that censored runs leave."""
    difference = contrast.log_e50
    if difference is None:
        return "–"
    ratio = number(math.exp(difference.mean))
    if contrast.bound:
        ours, theirs = contrast.censored
        lower, higher = contrast.decided
        value = {"at most": f"≤ {ratio}", "at least": f"≥ {ratio}", "unknown": "unknown"}[contrast.bound]
        return f"{value} (censored: {ours} of ours, {theirs} of the reference; {lower} pairs lower, {higher} higher)"
    if math.isnan(difference.low):
        return ratio
    return f"{ratio} [{number(math.exp(difference.low))}, {number(math.exp(difference.high))}]"


def _ratio_cells(contrast: Contrast, with_speeds: bool) -> list[str]:
    ratios = (contrast.params_ratio, contrast.bytes_ratio, *([contrast.speed_ratio] if with_speeds else []))
    return [f"{contrast.macs_ratio:.2f}", "yes" if contrast.equal_flop else "no", *(f"{ratio:.2f}" for ratio in ratios)]


def _p_cell(contrast: Contrast) -> str:
    value = contrast.p if contrast.primary else contrast.p_holm
    text = "–" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"
    return f"{text} (primary)" if contrast.primary else text


HOW_PAIRED = (
    "Paired over seeds (same world, data order and initial shared weights). Negative differences and ratios below 1 "
    "mean fewer exposures than the reference. Intervals are 95 % t-intervals (of ratios: of the mean log) and need "
    f"{MIN_PAIRS} pairs. Bits are compared at the last exposure that every run of the contrast reached: runs stop once "
    "past half of N H, so the faster family sets it. p is of the paired t-test of log E50; that of the primary "
    "contrast is unadjusted, all others are adjusted by Holm's method. Where runs are censored (they never reached "
    "half of N H) there is no interval: their last exposure bounds the ratio from one side, and p is of an exact sign "
    "test over the pairs whose direction is certain."
)
HOW_CONTROLLED = (
    "Each variant against its own controls, paired over seeds: the same model with a table of one row, with a frozen "
    "random table, with addresses in a random fixed order, or with a dense layer of equal multiply-adds. Ratios below "
    "1 mean that the table itself saves exposures; a ratio of 1 means that what surrounds it does. Not adjusted for "
    f"the number of comparisons; intervals from {MIN_PAIRS} pairs."
)
HOW_COSTED = (
    f"MACs, parameters and bytes read per token are counted from the structure; within {EQUAL:.0%} of the reference's "
    "MACs a comparison is called equal-FLOP. Tokens per second and wall-clock appear only where runs of one variant "
    "show that the machine was steady. Compute multiplier at E50: training FLOPs that the reference needs for half of "
    "N H over those that the variant needs; it is at this one base size, not along a law over sizes."
)
HOW_CROSSED = (
    "Two scores are paired only if task version, prompts, few-shot examples, limit, number of questions and data are "
    "the same. ↑: a positive difference is better, ↓: a negative one is. Differences have 95 % t-intervals over pairs "
    "of runs, for these questions. Over runs x questions: an interval of the same difference, taken question by "
    "question, with runs and questions as random effects, so that it also holds for other questions of the kind; given "
    f"for {MIN_PAIRS}+ pairs, for answers that are right or wrong."
)
