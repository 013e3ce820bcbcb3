"""Choosing among laws: by held-out error, then the fewest parameters within one standard error of the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.columns import number
from analysis.fits.fit import fit
from analysis.fits.intervals import HeldOut
from analysis.fits.problem import Problem
from analysis.laws.joint import JOINT
from analysis.laws.law import Law
from analysis.studies.document import Fitted, fitted
from analysis.studies.request import Request, chosen_law, data, held_out, named_law

RULE = (
    "smallest mean |log error| on the held-out largest cells, "
    "then the fewest parameters within one standard error of it"
)


def select_joint(rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], request: Request) -> list[Fitted]:
    """Fit all joint laws that the data allow, score each on its held-out cells, and select one by the rule.

    joint4 needs D; without a column D no law has a D term. A candidate with too few points is listed with the reason.

    Args:
        rows: The rows to fit.
        table: The whole table.
        columns: Expression of each input and of the output.
        request: The options of the fit.

    Returns:
        The candidates, the selected one first; its document lists the scores and all candidates' documents.
    """
    scores: dict[str, np.ndarray] = {}
    candidates: list[Fitted] = []
    refused: dict[str, str] = {}
    for name in JOINT:
        try:
            law = chosen_law(name, columns, request)
            posed, used = data(law, rows, columns, request)
            held = held_out(posed, used, request)
            if not len(held.rows):
                raise InputError(f"nothing held out: {held.reason}")
            candidates.append(fitted(law, rows, table, columns, request))
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
    """Return the |log error| of each held-out cell, the mean over its runs; infinite where a prediction is not
    positive."""
    with np.errstate(invalid="ignore"):
        errors = np.abs(np.log(held.predicted / held.observed))
    runs = pd.DataFrame({name: values[held.rows] for name, values in posed.x.items()})
    cells = runs.assign(error=np.where(np.isfinite(errors), errors, np.inf)).groupby(list(posed.x))
    return cells["error"].mean().to_numpy()


def choose(scores: Mapping[str, np.ndarray], parameters: Mapping[str, int]) -> str:
    """Return the law with the fewest parameters whose mean score is within one standard error of the best law's."""
    means = {name: float(value.mean()) for name, value in scores.items()}
    best = min(means, key=lambda name: means[name])
    errors = scores[best]
    reach = float(errors.std(ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else 0.0
    near = [name for name in means if means[name] <= means[best] + reach]
    return min(near, key=lambda name: (parameters[name], means[name]))


ROLLING = (
    "smallest mean |error| over blocks of larger and larger cells, each predicted by a fit to all smaller ones, "
    "then the fewest parameters within one standard error of it"
)


def select(
    rows: pd.DataFrame, columns: Mapping[str, str], requests: Sequence[Request], size: str, blocks: int
) -> dict[str, Any]:
    """Compare laws by rolling hold-out: fit up to a size, predict the next ones.

    Args:
        rows: The rows of the table.
        columns: Expressions by name; each law uses those that it needs.
        requests: The fits to compare, one per law.
        size: Expression of a cell's size.
        blocks: Number of blocks of sizes that are predicted in turn, from the larger half of the sizes.

    Returns:
        The document: for each law its parameters, mean error and the error of each block; the laws refused with the
        reason; the one selected.
    """
    order = number(rows, size, "--size")
    if not np.isfinite(order).all():
        raise InputError(f"--size: {size} is missing or infinite in some rows")
    edges = _edges(order, blocks)
    laws: list[dict[str, Any]] = []
    scores, refused = {}, {}
    for request in requests:
        try:
            law = chosen_law(request.law, _needed(request, columns), request)
            cells = _rolling(law, rows, _needed(request, columns), request, order, edges)
        except InputError as error:
            refused[request.label] = str(error)
            continue
        scores[request.label] = cells["error"].to_numpy()
        laws.append(
            {
                "law": request.label,
                "formula": law.formula,
                "parameters": len(law.names) - len(request.fix or {}),
                "mean_error": float(cells["error"].mean()),
                "blocks": [float(part["error"].mean()) for _, part in cells.groupby("block")],
            }
        )
    if not laws:
        raise InputError(next(iter(refused.values())))
    selected = choose(scores, {item["law"]: item["parameters"] for item in laws})
    return {
        "selected": selected,
        "rule": ROLLING,
        "edges": [float(edge) for edge in edges],
        "laws": laws,
        "refused": refused,
    }


def _needed(request: Request, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that this law uses."""
    law = named_law(request.law, columns, request)
    return {name: text for name, text in columns.items() if name in law.inputs or name == law.output}


def _edges(sizes: np.ndarray, blocks: int) -> list[float]:
    """Return the largest size of the first fit and of each block."""
    unique = np.unique(sizes)
    if len(unique) < 3:
        raise InputError(f"--size: {len(unique)} different sizes, needed: at least 3")
    last = np.unique(np.round(np.linspace((len(unique) - 1) // 2, len(unique) - 1, blocks + 1)).astype(int))
    return [float(unique[i]) for i in last]


def _rolling(
    law: Law, rows: pd.DataFrame, columns: Mapping[str, str], request: Request, sizes: np.ndarray, edges: list[float]
) -> pd.DataFrame:
    """Return the error of each held-out cell, (block, error), the mean over its runs."""
    posed, used = data(law, rows, columns, request)
    size = sizes[rows.index.get_indexer(used.index)]
    parts = []
    for block, (low, high) in enumerate(pairwise(edges)):
        held = (size > low) & (size <= high)
        estimate = fit(posed.restricted(size <= low), request.seed)
        predicted = estimate.predict({name: values[held] for name, values in posed.x.items()})
        observed = posed.y[held]
        with np.errstate(all="ignore"):
            error = np.abs(np.log(predicted / observed)) if (posed.y > 0).all() else np.abs(predicted - observed)
        cells = pd.DataFrame({name: values[held] for name, values in posed.x.items()})
        error = np.where(np.isfinite(error), error, np.inf)
        mean = cells.assign(error=error).groupby(list(posed.x))["error"].mean()
        parts.append(pd.DataFrame({"block": block, "error": mean.to_numpy()}))
    return pd.concat(parts, ignore_index=True)


def select_text(document: Mapping[str, Any]) -> str:
    """Return the comparison as lines for a terminal."""
    lines = [f"rolling hold-out; fits up to sizes {', '.join(f'{edge:.4g}' for edge in document['edges'][:-1])}"]
    for item in sorted(document["laws"], key=lambda item: item["mean_error"]):
        blocks = ", ".join(f"{value:.3%}" for value in item["blocks"])
        lines.append(
            f"  {item['law']:16} {item['parameters']} parameters, mean |error| {item['mean_error']:.3%} ({blocks})"
        )
    lines += [f"  left out: {name}: {reason}" for name, reason in document["refused"].items()]
    lines.append(f"selected: {document['selected']} ({document['rule']})")
    return "\n".join(lines)
