"""IsoFLOP analysis: a parabola per compute budget, and the law of the optima over budgets.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): at each budget the loss is a parabola in ln N; the optima
follow Nopt = k C^a, fitted in logarithms with each budget weighted by the inverse variance of its ln Nopt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import style
from analysis.errors import InputError
from analysis.fit import Fit, fit
from analysis.fitting import Request, data, document
from analysis.inputs import evaluate
from analysis.laws import LAWS
from analysis.uncertainty import standard_errors


def isoflop_document(rows: pd.DataFrame, columns: Mapping[str, str], asked: Request) -> dict[str, Any]:
    """Parabolas by `asked.group` (the compute budget) and the frontier; budgets with too few sizes are listed as
    refused."""
    assert asked.group is not None
    budgets = evaluate(rows, asked.group, "--group").to_numpy(float)
    if not (np.isfinite(budgets).all() and (budgets > 0).all()):
        raise InputError("--group: compute budgets must be numbers above 0")
    alone = replace(asked, group=None, figure=None, predict=None, cluster=None, strata=None, bootstrap=0, holdout=0.0)
    groups, fits, refused = [], [], {}
    for budget in sorted(set(budgets.tolist())):
        try:
            posed, _ = data(LAWS["isoflop"], rows[budgets == budget], columns, alone)
            found = fit(posed, asked.seed)
            groups.append({"C": budget, **document(LAWS["isoflop"], rows[budgets == budget], rows, columns, alone)})
            fits.append((budget, found))
        except InputError as error:
            refused[f"{budget:g}"] = str(error)
    if not groups:
        raise InputError("--group: no budget can be fitted: " + next(iter(refused.values())))
    result: dict[str, Any] = {"law": "isoflop", "n": sum(g["n"] for g in groups), "groups": groups, "refused": refused}
    inside = [group for group, (_, found) in zip(groups, fits, strict=True) if _inside(found)]
    result["outside"] = [group["C"] for group in groups if group not in inside]
    result["frontier"] = _frontier(inside, asked)
    if asked.figure is not None:
        result["figure"] = [str(path) for path in isoflop_figure(fits, result["frontier"], asked)]
    return result


def _inside(found: Fit) -> bool:
    """Whether the optimum lies among the sizes tried; one that does not is an extrapolation and no evidence."""
    sizes = found.problem.x["N"]
    return bool(sizes.min() < found.parameters["Nopt"] < sizes.max())


def _frontier(groups: list[dict[str, Any]], asked: Request) -> dict[str, Any]:
    """Nopt against C over budgets whose optimum is among their sizes."""
    if len(groups) < 3:
        return {"n": len(groups), "reason": "needs three budgets whose optimum lies among their sizes"}
    optima = np.array([group["parameters"]["Nopt"] for group in groups])
    spread = np.array([group["standard_errors"]["Nopt"] for group in groups]) / optima
    weights = np.ones(len(groups))
    if (np.isfinite(spread) & (spread > 0)).all():
        weights = 1 / spread**2 / np.mean(1 / spread**2)
    table = pd.DataFrame({"C": [group["C"] for group in groups], "y": optima, "weight": weights})
    plain = Request("frontier", "C=C,y=y", weights="weight", holdout=asked.holdout, seed=asked.seed)
    return document(LAWS["frontier"], table, table, {"C": "C", "y": "y"}, plain)


def isoflop_figure(fits: list[tuple[float, Fit]], frontier: Mapping[str, Any], asked: Request) -> list[Path]:
    """The parabolas with their data, the optima, and the frontier with its 95 % interval for the exponent."""
    from matplotlib import colormaps

    assert asked.figure is not None
    with style.figure(1, 2, width=7.2, height=3.6) as (drawn, (left, right)):
        for rank, (budget, found) in enumerate(fits):
            color = colormaps["viridis"](0.9 * rank / max(len(fits) - 1, 1))
            sizes = found.problem.x["N"]
            at = np.geomspace(sizes.min(), sizes.max(), 100)
            left.plot(sizes, found.problem.y, "o", color=color, markersize=3)
            left.plot(
                at, found.predict({"N": at}), color=color, linewidth=1, label=f"{budget:.2g} (n={found.problem.n})"
            )
            optimum, error = found.parameters["Nopt"], standard_errors(found)["Nopt"]
            left.plot([optimum], [found.parameters["Lmin"]], "*", color=color, markersize=8)
            face = color if _inside(found) else "white"
            reach = [1.96 * min(error, optimum / 2)]
            right.errorbar([budget], [optimum], yerr=reach, fmt="o", color=color, markerfacecolor=face)
        if "parameters" in frontier:
            ends = np.array([fits[0][0], fits[-1][0]])
            k, a = frontier["parameters"]["k"], frontier["parameters"]["a"]
            low, high = frontier["intervals"]["a"]
            words = f"a = {a:.3f} [{low:.3f}, {high:.3f}]"
            right.plot(ends, k * ends**a, color="#000000", linewidth=1, label=words)
            right.legend(loc="best")
        for axis in (left, right):
            style.log_axis(axis)
        right.set_yscale("log")
        left.set_xlabel("parameters")
        left.set_ylabel("loss")
        left.legend(title="training FLOPs", loc="best", fontsize=6, title_fontsize=6.5)
        right.set_xlabel("training FLOPs")
        right.set_ylabel("optimal parameters")
        note = (
            "Left: runs and a parabola in ln N per budget, stars at the optima. Right: optima with 1.96 standard "
            f"errors; open: outside the sizes tried and left out of the law. Source: {asked.source}."
        )
        return style.save(drawn, asked.figure, "isoflop", note)
