"""Whether measured speeds compare variants: how steady the machine was.

It was not if runs of one variant differ in speed, or if runs had different shares of their cores, since other programs
may have slowed one variant alone. Shares are known of runs of one thread on a CPU.
"""

from __future__ import annotations

import math

from analysis.records.grid_data import GridData
from analysis.records.tables import number

UNSTEADY = 1.25
"""Runs of one variant whose speeds differ by more than this factor, or any runs whose shares of a core do, were slowed
by other programs."""


def speed_spread(data: GridData) -> float:
    """Return the largest ratio of the speeds of two runs of one variant; NaN if no variant has two finished runs."""
    speeds = data.done.groupby(["base", "label"])["tokens_per_s"]
    ratios = (speeds.max() / speeds.min())[speeds.count() > 1]
    return float(ratios.max()) if len(ratios) else math.nan


def why_not_compared(data: GridData) -> str | None:
    """Return why the speeds of variants are not compared, in a sentence; None if they are."""
    spread, shares = speed_spread(data), data.done["cpu_share"].dropna()
    if math.isnan(spread):
        reason = "No variant has two runs that show how steady the machine was"
    elif spread > UNSTEADY:
        reason = f"The machine was unsteady: runs of one variant differ in speed by up to {number(spread, 2)} times"
    elif len(shares) and shares.max() > UNSTEADY * shares.min():
        reason = f"The machine was unsteady: runs had between {shares.min():.0%} and {shares.max():.0%} of a core"
    else:
        return None
    return (
        f"{reason}, so tokens per second and wall-clock do not compare variants here; to measure them side by side: "
        "suite bench step."
    )
