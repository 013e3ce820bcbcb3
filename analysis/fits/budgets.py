"""Compute budgets: which runs of a table share one."""

from __future__ import annotations

import numpy as np

SAME_BUDGET = 1.05
"""Runs whose FLOPs differ by less than this ratio from the least of them share a budget."""


def budgets(flops: np.ndarray) -> np.ndarray:
    """Each run's budget, (n,): the geometric mean of the runs whose FLOPs are nearly the same."""
    order = np.argsort(flops, kind="stable")
    ranks, first, rank = np.empty(len(flops), int), 0.0, -1
    for run in order:
        if flops[run] > first * SAME_BUDGET:
            first, rank = flops[run], rank + 1
        ranks[run] = rank
    shared = {rank: np.unique(flops[ranks == rank]) for rank in set(ranks.tolist())}
    means = {rank: float(v[0] if len(v) == 1 else np.exp(np.log(v).mean())) for rank, v in shared.items()}
    return np.array([means[rank] for rank in ranks.tolist()])
