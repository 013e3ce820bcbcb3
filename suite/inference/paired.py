"""Differences of two models on the same documents, with paired standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GROUPS = 50
"""Groups of the jackknife, or fewer if there are fewer clusters."""

Sample = Mapping[str, Any]
"""lm-eval's log of one document: `doc`, and the value of each metric before it is aggregated."""
Aggregate = Callable[[Sequence[Any]], float]


def differences(
    ours: Sequence[Sample], others: Sequence[Sample], aggregations: Mapping[str, Aggregate]
) -> dict[str, dict[str, float | None]]:
    """Compare two models metric by metric.

    Args:
        ours: The samples of one model.
        others: Those of the model it is compared with, for the same documents in the same order.
        aggregations: How each metric is made of the values of its documents.

    Returns:
        {metric: {"reference", "difference", "stderr"}}: the value of the other model, ours minus that, and the paired
        standard error of the difference; None for a single cluster.
    """
    clusters = _clusters(ours)
    compared = {}
    for metric, aggregate in aggregations.items():
        values, reference = ([sample.get(metric) for sample in samples] for samples in (ours, others))
        if any(value is None for value in (*values, *reference)):
            continue
        theirs = float(aggregate(reference))
        compared[metric] = {
            "reference": theirs,
            "difference": float(aggregate(values)) - theirs,
            "stderr": _paired_error(values, reference, aggregate, clusters),
        }
    return compared


def _clusters(samples: Sequence[Sample]) -> list[int]:
    """Return a number for each document; documents about one person have the same."""
    numbers: dict[Any, int] = {}
    keys = (_person(sample["doc"], index) for index, sample in enumerate(samples))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _person(doc: Any, index: int) -> Any:
    person = doc.get("person") if isinstance(doc, Mapping) else None
    return ("document", index) if person is None else person


def _paired_error(
    values: Sequence[Any], reference: Sequence[Any], aggregate: Aggregate, clusters: Sequence[int]
) -> float | None:
    """Return the standard error of a difference by a jackknife over groups of clusters (Efron 1982, section 3).

    For G groups, that of a sum, such as bits learned, is too small by a factor of (G - 1) / G.
    """
    groups = min(GROUPS, max(clusters) + 1)
    if groups < 2:
        return None
    left_out = []
    for group in range(groups):
        rest = [index for index, cluster in enumerate(clusters) if cluster % groups != group]
        ours, others = (aggregate([items[index] for index in rest]) for items in (values, reference))
        left_out.append(ours - others)
    mean = sum(left_out) / groups
    return math.sqrt((groups - 1) / groups * sum((value - mean) ** 2 for value in left_out))
