"""One sparse budget divided between tables and experts: the outcome against the share in tables.

The sparse budget of a model is the parameters that a token does not use. The share in tables is the elements of its
value tables over them, at most 1: the few rows that a token reads are counted in, since accounts do not state them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.comparisons.destinations.next_parameter import gains_by_seed, metric_of, outcomes, places
from analysis.comparisons.statistics import Difference, paired
from analysis.records.grid_data import GridData

EQUAL = 1.02
"""Largest ratio of two sparse budgets that count as equal."""
MIN_SHARES = 3
"""Fewest different shares of a budget, in percent, that are compared."""


@dataclass(frozen=True)
class Division:
    """One variant of a budget.

    Attributes:
        label: The variant.
        family: Its family.
        share: Share of the sparse budget in tables.
        sparse: Parameters that a token does not use.
        active: Parameters that it uses.
        gain: Mean gain over the variant of the least share, paired by seed: in doublings of learning speed for E50, or
            as an improvement of the metric.
        left_out: Number of pairs without a gain: half of the bits was never learned, or their tokens differ.
    """

    label: str
    family: str
    share: float
    sparse: int
    active: int
    gain: Difference
    left_out: int


@dataclass(frozen=True)
class Budget:
    """Variants of one base and world with equal sparse budgets, by share; the others are compared with the first."""

    base: str
    divisions: tuple[Division, ...]

    @property
    def name(self) -> str:
        """The base and the first variant's sparse budget."""
        return f"{self.base}, {self.divisions[0].sparse:,} sparse parameters"


def budgets(data: GridData) -> tuple[str, list[Budget]]:
    """Return the metric of gains, and every sparse budget that variants divide in at least MIN_SHARES ways.

    Controls and runs with smaller tables are left out.

    Raises:
        InputError: The runs have no metric, or scores that were made in several ways.
    """
    metric = metric_of(data, None)
    runs = data.done.assign(place=places(data.done), sparse=data.done["params_total"] - data.done["params_active"])
    runs = runs[(runs["sparse"] > 0) & runs["control"].isna() & ~runs["smaller"]]
    share = np.minimum(1.0, runs["params_memory"] / runs["sparse"])
    runs = runs.assign(outcome=outcomes(data, metric).reindex(runs.index), share=share)
    result = []
    for _, world in runs.groupby("pairing", sort=False):
        for labels in _equal(world.groupby("label", sort=False)["sparse"].median()):
            members = [world[world["label"] == label] for label in labels]
            members.sort(key=lambda group: float(group["share"].iloc[0]))
            if len({round(100 * float(group["share"].iloc[0])) for group in members}) >= MIN_SHARES:
                divisions = tuple(_division(members[0], group, metric) for group in members)
                result.append(Budget(str(world["place"].iloc[0]), divisions))
    return metric, result


def _equal(sparse: pd.Series) -> Iterator[list[str]]:
    """Yield the variants of each budget, smallest budgets first: those within EQUAL of the smallest of them."""
    left = sparse.sort_values(kind="stable")
    while len(left):
        own = left <= EQUAL * left.iloc[0]
        yield [str(label) for label in left.index[own]]
        left = left[~own]


def _division(first: pd.DataFrame, own: pd.DataFrame, metric: str) -> Division:
    """Return one variant, paired by seed with the runs of the first one."""
    gains = gains_by_seed(own, first, metric)
    row = own.iloc[0]
    return Division(
        str(row["label"]),
        str(row["family"]),
        float(row["share"]),
        int(row["sparse"]),
        int(row["params_active"]),
        paired(gains.dropna().to_numpy(float)),
        int(gains.isna().sum()),
    )
