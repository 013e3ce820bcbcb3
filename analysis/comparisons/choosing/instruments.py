"""Raw probes, probes of averaged weights and annealed branches, compared on the same runs.

All three measure bits learned about the same people, as a share of what there is to learn. A raw or averaged
measurement belongs to the part of a run at a constant learning rate; between two probes a curve is linear in the
logarithm of the exposure. An annealed one is the last probe of a branch whose learning rate was lowered to the end
(schedule wsd); branches that differ only in their budget share their constant part and count as one run. Instruments
are compared at every exposure at which a branch ends, or without branches at every common probe, and in E50; only runs
that all instruments have measured count.

A good instrument has little noise relative to the differences between variants. `sd` is the standard deviation between
seeds, pooled over the variants of one base and world; its interval is that of a variance of normal values. The ratio of
two instruments' `sd` has the interval of Pitman and Morgan, which allows for the correlation of measurements of one
run. `separation` is the standard deviation between the variants' true means over `sd`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import Difference, paired
from analysis.errors import InputError
from analysis.records.grid_data import GridData
from analysis.records.run_files import AVERAGED
from analysis.records.runs.curves import Curves
from analysis.records.runs.labels import labels

RAW, AVERAGE, ANNEALED = "raw", "averaged", "annealed"
E50 = "e50"
COLUMNS = {RAW: "storage_bits", AVERAGE: f"{AVERAGED}storage_bits"}
NAN = float("nan")


@dataclass(frozen=True)
class Noise:
    """The noise of one instrument at one point.

    Attributes:
        base: Base size; with `people`, the world.
        people: People of the world.
        at: An exposure, or "e50" (then in natural logarithms of exposures).
        instrument: raw, averaged or annealed.
        variants: Number of variants.
        runs: Number of runs.
        sd: Standard deviation between seeds, pooled over variants, with its 95 % interval `low` to `high`.
        ratio: `sd` over that of the raw probes, with its 95 % interval.
        separation: Standard deviation between variants, without the part due to seeds, over `sd`.
    """

    base: str
    people: float
    at: str
    instrument: str
    variants: int
    runs: int
    sd: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    separation: float


@dataclass(frozen=True)
class Order:
    """The difference of two variants under one instrument at one point, paired over seeds; see `Noise`."""

    base: str
    people: float
    at: str
    first: str
    second: str
    instrument: str
    difference: Difference

    @property
    def decided(self) -> bool:
        """Whether the 95 % interval excludes 0."""
        return self.difference.p < 0.05


def measurements(data: GridData) -> pd.DataFrame:
    """Return one row per run, point and instrument: base, people, variant, seed, at, instrument, value.

    Raises:
        InputError: No run was measured by two instruments.
    """
    runs = _grouped(data)
    raw = {name: _steady_curves(data, runs, column) for name, column in COLUMNS.items()}
    ends = _annealed(data, runs)
    parts = []
    for _, world in runs.groupby("pairing", sort=False):
        parts += [_at_exposures(world, raw, ends), _at_half(world, raw, ends)]
    table = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    if table.empty:
        raise InputError(
            f"{data.grid or 'the results'}: no run was measured by two instruments, of raw probes, averaged ones"
            " (train.probe_average) and annealed branches (train.branches with schedule wsd), at a constant rate"
        )
    return table


def _grouped(data: GridData) -> pd.DataFrame:
    """Return the finished runs with the number of their group: runs that differ only in their budget."""
    runs = data.done[data.curves(COLUMNS[RAW]).count[data.done.index] > 0]
    shared = [{key: value for key, value in train.items() if key not in BUDGET} for train in runs["train"]]
    cells = [{"model": model, "train": train} for model, train in zip(runs["model"], shared, strict=True)]
    keys = [json.dumps(cell, sort_keys=True) for cell in cells]
    runs = runs.assign(variant=labels(cells) if cells else [], key=keys)
    return runs.assign(group=runs.groupby(["pairing", "key", "seed"], sort=False).ngroup())


BUDGET = ("tokens", "epochs", "branches", "parent")
"""Training settings in which branches of one run may differ."""


def _last_steady_step(steady: bool, train: Mapping[str, Any], pairing: str) -> float:
    """Return the last step before the learning rate of a run decays; infinite at a constant rate."""
    if steady:
        return float("inf")
    if train.get("schedule") != "wsd" or train.get("tokens") is None:
        return 0.0
    rows = json.loads(pairing)[1]["seq_len"] * train["batch_rows"]
    steps = max(1, int(train["tokens"]) // rows)
    return float(steps - max(1, round(train["decay"] * steps)))


def _steady_curves(data: GridData, runs: pd.DataFrame, column: str) -> Curves:
    """Return one curve per group: the probes at a constant rate of the run that has the most of them, as shares."""
    groups = int(runs["group"].max()) + 1 if len(runs) else 0
    if column not in data.probes:
        return Curves(np.array([], int), np.array([]), np.array([]), groups)
    settings = zip(runs["steady"], runs["train"], runs["pairing"], strict=True)
    last = pd.Series(np.array([_last_steady_step(*own) for own in settings]), runs.index)
    probes = data.probes[data.probes[column].notna() & data.probes["run"].isin(runs.index)]
    probes = probes[probes["step"] <= probes["run"].map(last)]
    counted = probes.groupby("run")["epoch"].max().rename("reach").to_frame()
    counted["group"] = runs["group"].reindex(counted.index)
    longest = counted.sort_values("reach", kind="stable").groupby("group")["reach"].idxmax()
    chosen = probes[probes["run"].isin(longest)]
    chosen = chosen.assign(group=chosen["run"].map(runs["group"]), share=chosen[column] / chosen["storage_bits_max"])
    chosen = chosen.sort_values(["group", "epoch"])
    return Curves(chosen["group"].to_numpy(int), chosen["epoch"].to_numpy(), chosen["share"].to_numpy(), groups)


def _annealed(data: GridData, runs: pd.DataFrame) -> Curves:
    """Return one curve per group: the last probe of each of its branches, as shares."""
    groups = int(runs["group"].max()) + 1 if len(runs) else 0
    branches = runs[[train.get("schedule") == "wsd" for train in runs["train"]]]
    bits, most = data.curves(COLUMNS[RAW]), data.curves("storage_bits_max")
    at = branches.index.to_numpy(int)
    table = branches.assign(exposure=bits.last_x()[at], share=(bits.last_y() / most.last_y())[at])
    table = table.sort_values(["group", "exposure"])
    return Curves(table["group"].to_numpy(int), table["exposure"].to_numpy(), table["share"].to_numpy(), groups)


def _at_exposures(world: pd.DataFrame, steady: Mapping[str, Curves], ends: Curves) -> pd.DataFrame:
    """Return the measurements of one world at each exposure; see the module for which."""
    first = world.drop_duplicates("group")
    groups = first["group"].to_numpy(int)
    is_branched = bool(ends.count[groups].all())
    source = ends if is_branched else steady[RAW]
    exposures = np.unique(np.round(source.x[np.isin(source.run, groups)], 3))
    parts = []
    for exposure in exposures:
        values = {name: curves.at(exposure, groups) for name, curves in steady.items()}
        values[ANNEALED] = _nearest(ends, exposure, groups) if is_branched else np.full(len(groups), NAN)
        parts.append(_common(first, f"{exposure:g}", values))
    return pd.concat(parts, ignore_index=True) if parts else _common(first, E50, {})


def _nearest(ends: Curves, exposure: float, groups: np.ndarray) -> np.ndarray:
    """Return the value of the branch of each group that ends at an exposure (within 1 %); NaN without one."""
    values = np.full(len(groups), NAN)
    for place, group in enumerate(groups):
        own = ends.run == group
        same = own & (np.abs(ends.x / exposure - 1) <= 0.01)
        if same.any():
            values[place] = ends.y[same][0]
    return values


def _at_half(world: pd.DataFrame, steady: Mapping[str, Curves], ends: Curves) -> pd.DataFrame:
    """Return the logarithms of E50 of one world; NaN where a curve does not cross half of the bits."""
    first = world.drop_duplicates("group")
    groups = first["group"].to_numpy(int)
    values = {}
    for name, curves in {**steady, ANNEALED: ends}.items():
        e50, state = curves.crossing(np.full(curves.runs, 0.5))
        values[name] = np.log(np.where(state == "reached", e50, NAN))[groups]
    return _common(first, E50, values)


def _common(first: pd.DataFrame, at: str, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return the measurements of the runs that all instruments have measured; none if only one measured any run."""
    present = {name: column for name, column in values.items() if np.isfinite(column).any()}
    columns = ["base", "people", "variant", "seed"]
    if len(present) < 2:
        return pd.DataFrame(columns=[*columns, "at", "instrument", "value"])
    complete = np.all([np.isfinite(column) for column in present.values()], axis=0)
    return pd.concat(
        [
            first.loc[complete, columns].assign(at=at, instrument=name, value=column[complete])
            for name, column in present.items()
        ],
        ignore_index=True,
    )


POINT = ["base", "people", "at"]


def noise(table: pd.DataFrame) -> list[Noise]:
    """Return the noise of every instrument at every point that has a variant with two or more seeds."""
    result = []
    for (base, people, at), part in table.groupby(POINT, sort=False):
        wide = part.pivot_table(index=["variant", "seed"], columns="instrument", values="value")
        wide = wide[wide.groupby("variant")[wide.columns[0]].transform("size") > 1].dropna()
        variants, runs = wide.index.get_level_values("variant").nunique(), len(wide)
        free = runs - variants
        if free < 1:
            continue
        residuals = wide - wide.groupby("variant").transform("mean")
        for name in (RAW, AVERAGE, ANNEALED):
            if name in wide:
                sd = _pooled(residuals[name], free)
                numbers = sd, *_sd_interval(sd, free), *_ratio(residuals, name, free), _separation(wide[name], sd)
                result.append(Noise(str(base), float(str(people)), str(at), name, variants, runs, *numbers))
    return result


def _pooled(residuals: pd.Series, free: int) -> float:
    return float(np.sqrt((residuals**2).sum() / free))


def _sd_interval(sd: float, free: int) -> tuple[float, float]:
    """Return the 95 % interval of a standard deviation of normal values."""
    from scipy.special import chdtri

    return float(sd * np.sqrt(free / chdtri(free, 0.025))), float(sd * np.sqrt(free / chdtri(free, 0.975)))


def _ratio(residuals: pd.DataFrame, name: str, free: int) -> tuple[float, float, float]:
    """Return the ratio of an instrument's standard deviation to the raw one, with the interval of Pitman and Morgan."""
    from scipy.special import stdtrit

    if name == RAW or RAW not in residuals:
        return NAN, NAN, NAN
    ours, raw = residuals[name], residuals[RAW]
    variances = float((ours**2).sum()), float((raw**2).sum())
    if not all(variances):
        return NAN, NAN, NAN
    ratio = variances[0] / variances[1]
    if free < 2:
        return float(np.sqrt(ratio)), NAN, NAN
    correlation = float((ours * raw).sum() / np.sqrt(variances[0] * variances[1]))
    width = 1 + 2 * max(0.0, 1 - correlation**2) * float(stdtrit(free - 1, 0.975)) ** 2 / (free - 1)
    reach = np.sqrt(width**2 - 1)
    return float(np.sqrt(ratio)), float(np.sqrt(ratio * (width - reach))), float(np.sqrt(ratio * (width + reach)))


def _separation(values: pd.Series, sd: float) -> float:
    """Return the standard deviation between variants over that between seeds; NaN with one variant."""
    means, counts = (values.groupby("variant").agg(how) for how in ("mean", "size"))
    if len(means) < 2 or sd == 0:
        return NAN
    between = float(means.var()) - sd**2 * float((1 / counts).mean())
    return float(np.sqrt(max(0.0, between)) / sd)


def orders(table: pd.DataFrame) -> list[Order]:
    """Return the difference of every pair of variants under every instrument, by point."""
    result = []
    for (base, people, at), part in table.groupby(POINT, sort=False):
        wide = part.pivot_table(index="seed", columns=["instrument", "variant"], values="value")
        for first, second in combinations(dict.fromkeys(part["variant"]), 2):
            for name in (RAW, AVERAGE, ANNEALED):
                if (name, first) in wide and (name, second) in wide:
                    values = (wide[(name, first)] - wide[(name, second)]).dropna().to_numpy(float)
                    place = str(base), float(str(people)), str(at), first, second, name
                    if len(values):
                        result.append(Order(*place, paired(values)))
    return result


@dataclass(frozen=True)
class Agreement:
    """How often an instrument orders two variants as raw probes do, over all pairs and points.

    `contradicted` counts pairs that both decide (intervals exclude 0), in opposite directions.
    """

    instrument: str
    pairs: int
    alike: int
    decided: int
    decided_raw: int
    contradicted: int


def agreement(compared: list[Order]) -> list[Agreement]:
    """Return the agreement of each other instrument with raw probes."""
    raw = {(o.base, o.people, o.at, o.first, o.second): o for o in compared if o.instrument == RAW}
    result = []
    for name in (AVERAGE, ANNEALED):
        both = [
            (order, raw[key])
            for order in compared
            if order.instrument == name
            and (key := (order.base, order.people, order.at, order.first, order.second)) in raw
        ]
        if both:
            alike = [order.difference.mean * other.difference.mean > 0 for order, other in both]
            certain = [order.decided and other.decided for order, other in both]
            result.append(
                Agreement(
                    name,
                    len(both),
                    sum(alike),
                    sum(order.decided for order, _ in both),
                    sum(other.decided for _, other in both),
                    sum(sure and not same for sure, same in zip(certain, alike, strict=True)),
                )
            )
    return result


def document(table: pd.DataFrame) -> dict[str, Any]:
    """Return everything as plain values."""
    compared = orders(table)
    return {
        "noise": [vars(item) for item in noise(table)],
        "orders": [
            {**vars(order), "difference": vars(order.difference), "decided": order.decided} for order in compared
        ],
        "agreement": [vars(item) for item in agreement(compared)],
    }
