"""Compute budgets: which runs of a table share one."""

from __future__ import annotations

import numpy as np

SAME_BUDGET = 1.05
"""Where the gaps show no clear jump, a larger ratio between the FLOPs of two neighbouring runs separates them."""
LARGEST_GAP = 1.25
"""A gap above this ratio always separates two budgets."""
ROUNDING = 0.01
CLEAR = 3.0
"""How many times as wide (in logarithms) the gaps between budgets are as those within them, at least."""


def budgets(flops: np.ndarray) -> np.ndarray:
    """Return each run's budget, (n,): the geometric mean of the FLOPs of the runs that belong together.

    Runs are separated at the wide gaps between their sorted FLOPs. Which gaps are wide, the table decides: those from
    the largest jump in the sorted list of gaps on, so that budgets may scatter by several per cent about a nominal one.
    """
    order = np.argsort(flops, kind="stable")
    gaps = np.diff(np.log(flops[order]))
    group = np.empty(len(flops), int)
    group[order] = np.concatenate([[0], np.cumsum(gaps > _threshold(gaps))])
    values = [np.unique(flops[group == rank]) for rank in range(int(group.max()) + 1)]
    means = [float(v[0]) if len(v) == 1 else float(np.exp(np.log(v).mean())) for v in values]
    return np.array(means)[group]


def _threshold(gaps: np.ndarray) -> float:
    """Return the gap of log FLOPs above which two runs have different budgets."""
    widths = np.concatenate([[ROUNDING], np.sort(gaps[gaps > ROUNDING])])
    jumps = widths[1:] / widths[:-1]
    jumps[widths[1:] <= np.log(SAME_BUDGET)] = 0.0
    if not len(jumps) or jumps.max() < CLEAR:
        return float(np.log(SAME_BUDGET))
    return float(min(widths[int(np.argmax(jumps))], np.log(LARGEST_GAP)))
