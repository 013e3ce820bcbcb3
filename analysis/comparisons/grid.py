"""All comparisons of a grid, each computed once, when it is first needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from analysis.comparisons.controls import control_contrasts
from analysis.comparisons.destinations.next_parameter import Step, metric_of, steps
from analysis.comparisons.destinations.sparse_share import Budget, budgets
from analysis.comparisons.multiplier_grid import Named, multipliers_along_reference
from analysis.comparisons.paired import Contrast, contrasts
from analysis.comparisons.pooled import Pooled, pooled
from analysis.comparisons.trends import Trend, trends
from analysis.records.grid_data import GridData


@dataclass(frozen=True)
class Comparisons:
    """The paired contrasts, trends and compute multipliers of a grid."""

    data: GridData

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """See analysis.comparisons.paired."""
        return contrasts(self.data)

    @cached_property
    def controls(self) -> list[Contrast]:
        """See analysis.comparisons.controls."""
        return control_contrasts(self.data)

    @cached_property
    def pooled(self) -> Pooled | None:
        """See analysis.comparisons.pooled."""
        return pooled(self.data)

    @cached_property
    def trends(self) -> list[Trend]:
        """See analysis.comparisons.trends."""
        return trends(self.data)

    @cached_property
    def multipliers(self) -> tuple[list[Named], list[str]]:
        """The multipliers along the reference's runs, and the reasons for missing ones."""
        return multipliers_along_reference(self.data)

    @cached_property
    def steps(self) -> tuple[str, list[Step]]:
        """The metric of gains over the base, and the steps of all destinations; InputError without a metric."""
        metric = metric_of(self.data, None)
        return metric, steps(self.data, metric)

    @cached_property
    def sparse_shares(self) -> tuple[str, list[Budget]]:
        """See analysis.comparisons.destinations.sparse_share."""
        return budgets(self.data)
