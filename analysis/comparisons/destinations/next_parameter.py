"""Where the next parameter goes: what each destination gains over a base for what it adds.

A destination is a way to grow the reference's plain model of a base: a wider reference, or another family at one of its
sizes. A step is one size of a destination. Its gain is paired over seeds with the base: doublings of learning speed
(log2 of the ratio of E50), or the improvement of a final score. What it costs is its ratio to the base along an axis:
parameters, bytes held, bytes read, multiply-adds, or training time. All choices here are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import pandas as pd

from analysis.comparisons.direction import lower_is_better
from analysis.comparisons.paired import E50, SAME_TOKENS
from analysis.comparisons.statistics import Difference, holm, paired
from analysis.errors import InputError
from analysis.records.grid_data import GridData
from analysis.records.runs.labels import SHAPE, TABLE_SIZES, labels_across_bases

AXES = {
    "params": ("params_total", "parameters"),
    "held": ("bytes_held", "bytes of weights held"),
    "bytes": ("bytes_per_token", "bytes read per token"),
    "macs": ("macs", "multiply-adds per token"),
    "time": ("s_per_token", "training time per token"),
    "sparsity": ("total_over_active", "total over active parameters"),
}
"""Axis -> column and what it is called."""
BYTES_HELD = 2
"""Bytes per weight at inference (bf16), as in an account's bytes per token."""
SIZES = (*SHAPE, "experts", *TABLE_SIZES)
"""Model fields that make a destination larger; runs that differ in others belong to different destinations."""
SPENDS = float(np.log2(1.02))
"""A step whose cost is less than 2 % above the base's counts as without cost along an axis."""
WIDER = "wider"
ALPHA = 0.05


@dataclass(frozen=True)
class Step:
    """One size of a destination.

    Attributes:
        base: Name of the base size, and the people of its world where the base has several.
        destination: How the base grows.
        label: Variant of the runs.
        amount: Cost by axis, in the axis' units.
        doublings: Log2 of the ratio of that cost to the base's, by axis.
        gains: Gain by seed.
        left_out: Number of pairs without a gain: half of the bits was never learned, or their tokens differ.
    """

    base: str
    destination: str
    label: str
    amount: Mapping[str, float]
    doublings: Mapping[str, float]
    gains: Mapping[int, float]
    left_out: int

    @property
    def gain(self) -> Difference:
        """The mean gain over seeds."""
        return paired(np.array([*self.gains.values()]))


@dataclass(frozen=True)
class Return:
    """What one step returns along an axis: see `per_doubling` and `equivalent_size`, which give its two numbers."""

    step: Step
    per_doubling: Difference | None
    equivalent_size: Difference | None


@dataclass(frozen=True)
class Lead:
    """The destination with the largest gain at one cost.

    Attributes:
        doublings: Log2 of the ratio of the cost to the base's.
        leader: Destination of the largest mean gain.
        runner_up: Destination of the next largest mean gain.
        difference: Gain of the leader less that of the runner-up, over common seeds.
        decided: Whether the leader gains more than every other destination measured at this cost, by t-tests at 5 %
            with Holm's adjustment over all comparisons of the base.
    """

    doublings: float
    leader: str
    runner_up: str
    difference: Difference
    decided: bool


def metric_of(data: GridData, metric: str | None) -> str:
    """Return the metric that gains are measured in: as requested, as the contrast declares, or E50 where runs have it.

    Raises:
        InputError: The runs do not have the metric.
    """
    available = [E50] if data.has_bits else []
    available += sorted(set(data.scores["key"])) if len(data.scores) else []
    if not available:
        raise InputError(f"{data.grid or 'the results'}: no finished run has an E50 or a score to measure gains in")
    declared = data.contrast.metric if data.contrast else available[0]
    chosen = metric or declared
    if metric is None and chosen not in available:
        raise InputError(
            f"no finished run of grid {data.grid} has {chosen}, the metric of its contrast; measured: "
            f"{', '.join(available)} (python -m analysis next --grid {data.grid} --metric NAME)"
        )
    if chosen not in available:
        raise InputError(f"--metric: got {chosen!r}, allowed: {', '.join(available)}")
    return str(chosen)


def steps(data: GridData, metric: str) -> list[Step]:
    """Return the steps of every destination, by base, destination and size; see the module."""
    runs = data.done[data.done["macs"].notna() & (data.done["partner"] >= 0) & ~data.done["smaller"]]
    runs = runs.assign(
        destination=_destinations(runs, data.reference),
        bytes_held=BYTES_HELD * runs["params_total"],
        s_per_token=runs["wall_s"] / runs["tokens"],
        total_over_active=runs["params_total"] / runs["params_active"],
        outcome=outcomes(data, metric).reindex(runs.index),
        base_label=data.runs["label"].to_numpy()[runs["partner"]],
        place=places(runs),
    )
    result = []
    for (_, base_label), family in runs.groupby(["pairing", "base_label"], sort=False):
        plain = family[(family["label"] == base_label) & ~family["reshaped"]]
        others = family[family["label"] != base_label]
        for (destination, label), step in others.groupby(["destination", "label"], sort=False):
            result.append(_step(plain, step, str(destination), str(label), metric))
    bases = {base: at for at, base in enumerate(data.bases)}
    ordered = runs.assign(size=runs["base"].map(bases)).sort_values(["size", "people"], kind="stable")
    order = {place: at for at, place in enumerate(dict.fromkeys(ordered["place"]))}
    names = list(dict.fromkeys(step.destination for step in result))
    return sorted(result, key=lambda step: (order[step.base], names.index(step.destination), step.doublings["params"]))


def places(runs: pd.DataFrame) -> list[str]:
    """Return the base of each run, with the people of its world where the base has several worlds."""
    several = runs.groupby("base")["people"].transform("nunique") > 1
    columns = zip(runs["base"], runs["people"], several, strict=True)
    return [f"{base}, {people:,.0f} people" if is_one else str(base) for base, people, is_one in columns]


def _destinations(runs: pd.DataFrame, reference: str) -> list[str]:
    """Return the destination of each run: its family and the model settings that distinguish it within the family."""
    models = [{"model": model} for model in runs["model"]]
    names = labels_across_bases(models, [f"model.{name}" for name in SIZES])
    is_reshaped = runs["reshaped"] & (runs["family"] == reference)
    return [
        name.replace(reference, f"{reference} {WIDER if ratio > 1 else 'narrower'}", 1) if reshaped else name
        for name, reshaped, ratio in zip(names, is_reshaped, runs["params_ratio"], strict=True)
    ]


def outcomes(data: GridData, metric: str) -> pd.Series:
    """Return the outcome of each finished run, larger is better; NaN without one."""
    if metric == E50:
        reached = data.done["e50_state"] == "reached"
        e50 = data.done["e50"].astype(float).where(reached)
        return pd.Series(-np.log2(e50.to_numpy(float)), index=e50.index)
    scores = data.scores[data.scores["key"] == metric]
    several = scores["score"].unique()
    if len(several) > 1:
        raise InputError(f"--metric {metric}: the runs were scored in {len(several)} ways; compare them in the report")
    sign = -1.0 if lower_is_better(metric) else 1.0
    return sign * scores.set_index("run")["value"].astype(float)


def _step(plain: pd.DataFrame, step: pd.DataFrame, destination: str, label: str, metric: str) -> Step:
    """Return the step of one variant, paired by seed with the runs of the base."""
    gains = gains_by_seed(step, plain, metric)
    amount = {axis: float(step[column].median()) for axis, (column, _) in AXES.items()}
    of_base = {axis: float(plain[column].median()) for axis, (column, _) in AXES.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = {axis: float(np.log2(amount[axis] / of_base[axis])) for axis in AXES}
    by_seed = {int(seed): float(gain) for seed, gain in gains.dropna().items()}  # type: ignore[call-overload]
    place = str(step["place"].iloc[0])
    return Step(place, destination, label, amount, doublings, by_seed, int(gains.isna().sum()))


def gains_by_seed(runs: pd.DataFrame, base: pd.DataFrame, metric: str) -> pd.Series:
    """Return the gains of one variant's runs over those of another, by seed; NaN where either has no outcome.

    Args:
        runs: Runs with `outcome`, `tokens` and `seed`.
        base: The runs that they are paired with.
        metric: What outcomes are; scores, unlike E50, are compared at equal tokens only.
    """
    pairs = runs.merge(base, on="seed", suffixes=("", "_base")).set_index("seed")
    gains = pairs["outcome"] - pairs["outcome_base"]
    if metric == E50:
        return gains
    return gains.where((pairs["tokens"] / pairs["tokens_base"] - 1).abs() <= SAME_TOKENS)


def returns_by_base(steps: Sequence[Step], reference: str, by: str) -> list[tuple[str, list[Return], list[Lead]]]:
    """Return the returns of the steps of every base along an axis, and the leading destination at each cost.

    Args:
        steps: As `steps` returns them.
        reference: The family whose wider models give the equivalent size.
        by: An axis.

    Returns:
        For each base: its name; its steps, those of a destination from small to large; and its leads.
    """
    result = []
    for base, group in groupby(steps, key=lambda step: step.base):
        members, returns = list(group), []
        sizes = equivalent_size(members, reference)
        for _, own in groupby(members, key=lambda step: step.destination):
            ordered = sorted(own, key=lambda step: step.doublings[by])
            rates = per_doubling(ordered, by)
            returns += [Return(step, rate, sizes.get(step.label)) for step, rate in zip(ordered, rates, strict=True)]
        result.append((base, returns, leads(members, by)))
    return result


def per_doubling(members: Sequence[Step], by: str) -> list[Difference | None]:
    """Return what each step of one destination gains per doubling of a cost, over the step before it (or the base).

    Args:
        members: The steps of one destination at one base, from small to large.
        by: An axis.

    Returns:
        The mean over seeds with its interval; None for a step that adds less than 2 % to the cost of the one before.
    """
    zero = dict.fromkeys(members[0].gains, 0.0) if members else {}
    result: list[Difference | None] = []
    for before, step in pairwise([None, *members]):
        assert step is not None
        start, earlier = (0.0, zero) if before is None else (before.doublings[by], before.gains)
        added = step.doublings[by] - start
        seeds = [seed for seed in step.gains if before is None or seed in earlier]
        values = [(step.gains[seed] - (earlier[seed] if before else 0.0)) / added for seed in seeds] if added else []
        result.append(paired(np.array(values)) if added >= SPENDS else None)
    return result


def leads(members: Sequence[Step], by: str) -> list[Lead]:
    """Return the destination with the largest gain at each cost that some step of a base has.

    The gain of a destination is interpolated linearly in the logarithm of the cost between its steps, from 0 at the
    base. A destination is not compared beyond its last step (plus 2 %).

    Args:
        members: All steps of one base.
        by: An axis.
    """
    curves = {name: curve for name, curve in _curves(members, by).items() if len(curve[1])}
    costs = sorted({float(x) for xs, _ in curves.values() for x in xs[1:]})
    compared = []
    for cost in costs:
        gains = {
            name: {seed: float(np.interp(cost, xs, ys)) for seed, ys in by_seed.items()}
            for name, (xs, by_seed) in curves.items()
            if xs[-1] > cost - SPENDS
        }
        if len(gains) > 1:
            compared.append((cost, *_against_others(gains)))
    adjusted = iter(holm([other.p for _, _, others in compared for other in others.values()]))
    result = []
    for cost, leader, others in compared:
        p_values = [next(adjusted) for _ in others]
        closest = min(others, key=lambda name: others[name].mean)
        result.append(Lead(cost, leader, closest, others[closest], all(p < ALPHA for p in p_values)))
    return result


def _curves(members: Sequence[Step], by: str) -> dict[str, tuple[np.ndarray, dict[int, np.ndarray]]]:
    """Return the gain of each destination over its cost, by the seeds that all of its steps have."""
    curves = {}
    for name in dict.fromkeys(step.destination for step in members):
        own = [step for step in members if step.destination == name and step.doublings[by] >= SPENDS]
        own = sorted(own, key=lambda step: step.doublings[by])
        seeds = set.intersection(*(set(step.gains) for step in own)) if own else set()
        xs = np.array([0.0, *(step.doublings[by] for step in own)])
        curves[name] = (xs, {seed: np.array([0.0, *(step.gains[seed] for step in own)]) for seed in sorted(seeds)})
    return curves


def _against_others(gains: Mapping[str, Mapping[int, float]]) -> tuple[str, dict[str, Difference]]:
    """Return the destination of the largest mean gain, and its difference to each other over common seeds."""
    leader = max(gains, key=lambda name: float(np.mean([*gains[name].values()])))
    others = {}
    for name in gains:
        if name != leader:
            seeds = [seed for seed in gains[leader] if seed in gains[name]]
            others[name] = paired(np.array([gains[leader][seed] - gains[name][seed] for seed in seeds]))
    return leader, others


def equivalent_size(members: Sequence[Step], reference: str) -> dict[str, Difference]:
    """Return the size of a reference model of equal outcome (N_eq), by label, as the log2 of its ratio to the base.

    Each seed's curve of the wider reference is solved for the seed's gain; see `leads` for what lies between its steps.

    Args:
        members: All steps of one base.
        reference: The family whose wider models they are compared with.

    Returns:
        By label; a variant is absent where the gain of any seed is outside the curve.
    """
    curves = _curves([step for step in members if step.destination == f"{reference} {WIDER}"], "params")
    if len(curves) != 1:
        return {}
    ((xs, by_seed),) = curves.values()
    sizes = {}
    for step in members:
        seeds = [seed for seed in step.gains if seed in by_seed]
        if step.destination.split(" ")[0] == reference or not seeds:
            continue
        equivalents = [crossing(xs, by_seed[seed], step.gains[seed]) for seed in seeds]
        if all(value is not None for value in equivalents):
            sizes[step.label] = paired(np.array(equivalents, float))
    return sizes


def crossing(xs: np.ndarray, ys: np.ndarray, value: float) -> float | None:
    """Return the first place where a piecewise linear curve reaches a value; None if it does not.

    Args:
        xs: Ascending places, (n,).
        ys: Values of the curve there, (n,).
        value: The value.
    """
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if min(y0, y1) <= value <= max(y0, y1):
            return float(x0 if y0 == y1 else x0 + (x1 - x0) * (value - y0) / (y1 - y0))
    return None
