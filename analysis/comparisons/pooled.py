"""A declared contrast over several worlds: the mean over worlds of the mean paired log ratio of E50.

It also holds the difference in the share of bits stored, at the last exposure that all runs of a world reached, which
runs that never reach half of the bits have, too.

Every world counts equally, whatever its number of pairs. The worlds are those of the grid, not a sample of worlds: the
interval covers the spread between seeds within each world (Welch and Satterthwaite). Whether the ratio is the same in
all worlds is tested by Welch's analysis of variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import Difference, paired
from analysis.records.grid_data import DONE, GridData
from analysis.records.runs.labels import flat

NAN = float("nan")


@dataclass(frozen=True)
class World:
    """The contrast in one world: the value of the field, and ln(E50 of the treatment / E50 of the reference).

    `open` counts pairs whose runs did not both reach half of the bits between two probes. `share` is the difference in
    the share of bits stored at `exposure`.
    """

    value: str
    log_ratio: Difference
    sd: float
    open: int
    share: Difference
    exposure: float


@dataclass(frozen=True)
class Pooled:
    """The contrast over all worlds.

    Attributes:
        over: The field.
        treatment: Family of the treatment.
        reference: Family of the reference.
        worlds: Each world, in the order of its values.
        log_ratio: Mean over worlds, with its 95 % interval and p; NaN where some world lacks two pairs or has open
            ones.
        same_p: p of the hypothesis that the ratio is the same in all worlds.
        share: Mean over worlds of the difference in the share of bits stored, as `log_ratio`.
    """

    over: str
    treatment: str
    reference: str
    worlds: tuple[World, ...]
    log_ratio: Difference
    same_p: float
    share: Difference


def pooled(data: GridData) -> Pooled | None:
    """Return the declared contrast over several worlds; None if the grid declares none or no pair is finished."""
    if data.contrast is None or data.contrast.over is None:
        return None
    pairs = _pairs(data, data.contrast.over)
    if pairs.empty:
        return None
    worlds, values, shares = [], [], []
    for value in sorted(pairs["value"].unique(), key=_sortable):
        part = pairs[pairs["value"] == value]
        own = part["log_ratio"].dropna().to_numpy(float)
        values.append(own)
        sd = float(own.std(ddof=1)) if len(own) > 1 else NAN
        shares.append(part["share_difference"].to_numpy(float))
        exposure = float(part["exposure"].iloc[0])
        worlds.append(World(value, paired(own), sd, int(part["log_ratio"].isna().sum()), paired(shares[-1]), exposure))
    families = str(pairs["family"].iloc[0]), str(pairs["family_ref"].iloc[0])
    complete = all(len(own) > 1 for own in values) and not any(world.open for world in worlds)
    none = Difference(NAN, NAN, NAN, NAN, len(pairs))
    estimate = _mean_of_means(values) if complete else none
    share = _mean_of_means(shares) if all(len(own) > 1 for own in shares) else none
    return Pooled(data.contrast.over, *families, tuple(worlds), estimate, _same(values) if complete else NAN, share)


def _pairs(data: GridData, over: str) -> pd.DataFrame:
    """Return one row per finished pair: the value of the field, the families, the log ratio (NaN if open), and the
    difference in the share of bits stored at the last exposure that all pairs of the value reached."""
    assert data.contrast is not None
    runs = data.runs[data.runs["state"] == DONE]
    runs = runs.assign(log_e50=np.log(runs["e50"].where(runs["e50_state"] == "reached").astype(float)))
    runs = runs.assign(value=[str(flat(cell).get(over)) for cell in runs["settings"]])
    runs = runs.assign(position=runs.index, last=data.curves("epoch").last_x()[runs.index.to_numpy(int)])
    columns = ["pairing", "seed", "value", "family", "log_e50", "position", "last", "bits_max"]
    sides = [runs.loc[runs["run"].isin(side), columns] for side in (data.contrast.treatment, data.contrast.reference)]
    both = sides[0].merge(sides[1], on=["pairing", "seed", "value"], suffixes=("", "_ref"))
    exposure = both[["last", "last_ref"]].min(axis=1).groupby(both["value"]).transform("min")
    bits, target = data.curves("storage_bits"), exposure.to_numpy(float)
    stored = [
        bits.at(target, both[f"position{side}"].to_numpy(int)) / both[f"bits_max{side}"].to_numpy(float)
        for side in ("", "_ref")
    ]
    return both.assign(
        log_ratio=both["log_e50"] - both["log_e50_ref"], share_difference=stored[0] - stored[1], exposure=exposure
    )


def _sortable(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _mean_of_means(values: list[np.ndarray]) -> Difference:
    """Return the mean of the worlds' means, each of two or more values, with its 95 % interval."""
    from scipy.special import stdtr, stdtrit

    count = np.array([len(own) for own in values])
    mean = float(np.mean([own.mean() for own in values]))
    parts = np.array([own.var(ddof=1) for own in values]) / count / len(values) ** 2
    error = float(np.sqrt(parts.sum()))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), int(count.sum()))
    free = float(parts.sum() ** 2 / (parts**2 / (count - 1)).sum())
    reach = float(stdtrit(free, 0.975)) * error
    return Difference(mean, mean - reach, mean + reach, float(2 * stdtr(free, -abs(mean / error))), int(count.sum()))


def _same(values: list[np.ndarray]) -> float:
    """Return the p of Welch's analysis of variance for equal means."""
    from scipy.special import fdtrc

    groups, count = len(values), np.array([len(own) for own in values])
    variance = np.array([own.var(ddof=1) for own in values])
    if groups < 2 or not variance.all():
        return NAN
    weight, means = count / variance, np.array([own.mean() for own in values])
    centre = (weight * means).sum() / weight.sum()
    spread = (weight * (means - centre) ** 2).sum() / (groups - 1)
    lack = ((1 - weight / weight.sum()) ** 2 / (count - 1)).sum()
    statistic = spread / (1 + 2 * (groups - 2) / (groups**2 - 1) * lack)
    return float(fdtrc(groups - 1, (groups**2 - 1) / (3 * lack), statistic))
