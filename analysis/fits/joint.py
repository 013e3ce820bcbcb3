"""Choosing among the joint laws: by held-out cells declared beforehand, then the fewest parameters within one SE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.document import Fitted, fitted
from analysis.fits.fit import Problem
from analysis.fits.intervals import HeldOut
from analysis.fits.laws import JOINT
from analysis.fits.request import Request, chosen_law, data, held_out

RULE = (
    "smallest mean |log error| on the held-out largest cells, "
    "then the fewest parameters within one standard error of it"
)


def select_joint(rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], request: Request) -> list[Fitted]:
    """Fit all joint laws that the data allow, score each on its held-out cells, and select one by the rule.

    joint4 needs D; without a column D no law has a D term. A candidate with too few points is listed with the reason.

    Returns:
        The candidates, the selected one first; its document lists the scores and all candidates' documents.
    """
    scores: dict[str, np.ndarray] = {}
    candidates: list[Fitted] = []
    refused: dict[str, str] = {}
    for name in JOINT:
        try:
            entry = chosen_law(name, columns, request)
            posed, used = data(entry, rows, columns, request)
            held = held_out(posed, used, request)
            if not len(held.rows):
                raise InputError(f"nothing held out: {held.reason}")
            candidates.append(fitted(entry, rows, table, columns, request))
        except InputError as error:
            refused[name] = str(error)
            continue
        scores[name] = cell_errors(posed, held)
    if not scores:  # the first has the fewest parameters, so its reason holds for all
        raise InputError(next(iter(refused.values())))
    documents = [item.document for item in candidates]
    chosen = choose(scores, {item["law"]: len(item["parameters"]) for item in documents})
    means = {name: float(value.mean()) for name, value in scores.items()}
    ranked = sorted(candidates, key=lambda item: item.document["law"] != chosen)
    selection = {"selected": chosen, "rule": RULE, "scores": means, "refused": refused, "candidates": documents}
    return [replace(ranked[0], document=ranked[0].document | selection), *ranked[1:]]


def cell_errors(posed: Problem, held: HeldOut) -> np.ndarray:
    """|log error| of each held-out cell, the mean over its runs; infinite where a prediction is not positive."""
    with np.errstate(invalid="ignore"):
        errors = np.abs(np.log(held.predicted / held.observed))
    runs = pd.DataFrame({name: values[held.rows] for name, values in posed.x.items()})
    cells = runs.assign(error=np.where(np.isfinite(errors), errors, np.inf)).groupby(list(posed.x))
    return cells["error"].mean().to_numpy()


def choose(scores: Mapping[str, np.ndarray], parameters: Mapping[str, int]) -> str:
    """The law with the fewest parameters whose mean score is within one standard error of the best law's."""
    means = {name: float(value.mean()) for name, value in scores.items()}
    best = min(means, key=lambda name: means[name])
    errors = scores[best]
    reach = float(errors.std(ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else 0.0
    near = [name for name in means if means[name] <= means[best] + reach]
    return min(near, key=lambda name: (parameters[name], means[name]))
