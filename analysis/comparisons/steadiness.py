"""Whether measured speeds compare variants: how much runs of one variant differ in speed."""

from __future__ import annotations

import math

from analysis.records.grid_data import GridData
from analysis.records.tables import number

UNSTEADY = 1.25
"""Runs of one variant that differ in speed by more than this were slowed by something else."""


def speed_spread(data: GridData) -> float:
    """Return the largest ratio of the speeds of two runs of one variant; NaN if no variant has two finished runs."""
    speeds = data.done.groupby(["base", "label"])["tokens_per_s"]
    ratios = (speeds.max() / speeds.min())[speeds.count() > 1]
    return float(ratios.max()) if len(ratios) else math.nan


def why_not_compared(data: GridData) -> str | None:
    """Return why the speeds of variants are not compared, in a sentence; None if they are."""
    spread = speed_spread(data)
    if spread <= UNSTEADY:
        return None
    reason = "No variant has two runs that show how steady the machine was"
    if not math.isnan(spread):
        reason = f"The machine was unsteady: runs of one variant differ in speed by up to {number(spread, 2)} times"
    return (
        f"{reason}, so tokens per second and wall-clock do not compare variants here; to measure them side by side: "
        "suite bench step."
    )
