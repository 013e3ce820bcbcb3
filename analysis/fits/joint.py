"""Choosing among the joint laws: by held-out cells declared beforehand, then the fewest parameters within one SE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.fit import Problem
from analysis.fits.fitting import Request, chosen_law, data, document, held_out
from analysis.fits.intervals import HeldOut
from analysis.fits.laws import JOINT

RULE = (
    "smallest mean |log error| on the held-out largest cells, "
    "then the fewest parameters within one standard error of it"
)


def select_joint(rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], asked: Request) -> dict[str, Any]:
    """All joint laws the data allow, each with its held-out score, and the one the rule selects.

    joint4 needs D; without a column D no law has a D term. A candidate with too few points is listed with the reason.
    """
    scores: dict[str, np.ndarray] = {}
    candidates, refused = [], {}
    for name in JOINT:
        try:
            entry = chosen_law(name, columns, asked)
            posed, used = data(entry, rows, columns, asked)
            held = held_out(posed, used, asked)
            if not len(held.rows):
                raise InputError(f"nothing held out: {held.reason}")
            candidates.append(document(entry, rows, table, columns, asked))
        except InputError as error:
            refused[name] = str(error)
            continue
        scores[name] = cell_errors(posed, held)
    if not scores:  # the first has the fewest parameters, so its reason holds for all
        raise InputError(next(iter(refused.values())))
    chosen = choose(scores, {item["law"]: len(item["parameters"]) for item in candidates})
    best = next(item for item in candidates if item["law"] == chosen)
    means = {name: float(value.mean()) for name, value in scores.items()}
    return best | {"selected": chosen, "rule": RULE, "scores": means, "refused": refused, "candidates": candidates}


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
