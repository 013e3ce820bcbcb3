"""IsoFLOP analysis: a parabola per compute budget, and the law of the optima over budgets.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): at each budget the loss is a parabola in ln N; the optima
follow Nopt = k C^a, fitted in logarithms with each budget weighted by the inverse variance of its ln Nopt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.budgets import budgets
from analysis.fits.columns import number
from analysis.fits.fit import Fit
from analysis.fits.intervals import standard_errors
from analysis.laws.builtin import LAWS
from analysis.studies.document import Fitted, fitted
from analysis.studies.request import Request

NOT_BY_BUDGET = ("predict", "cluster", "strata", "holdout_by", "out")


@dataclass(frozen=True)
class IsoFlops:
    """The parabola of each budget, the frontier through their optima, and the document about them."""

    fits: list[tuple[float, Fit]]
    usable: list[float]
    frontier: Fitted | None
    document: dict[str, Any]


def isoflops(rows: pd.DataFrame, columns: Mapping[str, str], request: Request) -> IsoFlops:
    """Fit a parabola per compute budget (`request.group`) and the frontier.

    The document lists budgets with too few sizes as refused, those whose optimum is not among their sizes as outside,
    and those whose optimum is not identified; none of them takes part in the frontier.

    Args:
        rows: The rows to fit.
        columns: Expression of each input and of the output.
        request: The options of the fit.
    """
    assert request.group is not None
    for name in NOT_BY_BUDGET:
        if getattr(request, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: not with --group; fit one budget by --where")
    flops = number(rows, request.group, "--group")
    if not (np.isfinite(flops).all() and (flops > 0).all()):
        raise InputError(f"--group: {request.group} is missing, infinite or not above 0 in some rows")
    alone = replace(request, group=None, figure=None, holdout=0.0)
    groups, fits, refused = [], [], {}
    by_run = budgets(flops)
    for budget in sorted(set(by_run.tolist())):
        part = rows[by_run == budget]
        try:
            parabola = fitted(LAWS["isoflop"], part, rows, columns, alone)
            fits.append((budget, parabola.estimate))
            groups.append({"C": budget, **parabola.document})
        except InputError as error:
            refused[f"{budget:.4g}"] = str(error)
    if not groups:
        raise InputError(f"--group: none of {len(refused)} budgets can be fitted: {next(iter(refused.values()))}")
    unidentified = [group["C"] for group in groups if not group["identified"]["Nopt"]]
    usable = [(budget, estimate) for budget, estimate in fits if inside(estimate) and budget not in unidentified]
    weighted, plain = _frontier(usable, True, request), _frontier(usable, False, request)
    reason = {"n": len(usable), "reason": "needs three budgets with an identified optimum among their sizes"}
    result: dict[str, Any] = {
        "law": "isoflop",
        "n": sum(group["n"] for group in groups),
        "groups": groups,
        "refused": refused,
        "outside": [budget for budget, estimate in fits if not inside(estimate)],
        "unidentified": unidentified,
        "frontier": reason if weighted is None else weighted.document,
        "frontier_unweighted": reason if plain is None else plain.document,
    }
    return IsoFlops(fits, [budget for budget, _ in usable], weighted, result)


def inside(estimate: Fit) -> bool:
    """Return whether the optimum lies among the sizes tried; one outside them is an extrapolation, not evidence."""
    sizes = estimate.problem.x["N"]
    return bool(sizes.min() < estimate.parameters["Nopt"] < sizes.max())


def _frontier(fits: list[tuple[float, Fit]], weighted: bool, request: Request) -> Fitted | None:
    """Fit Nopt against C, each budget weighted by the inverse variance of its ln Nopt, or all the same.

    Optima may lie closer to the line than their own errors allow: intervals use the larger of the two spreads.
    """
    if len(fits) < 3:
        return None
    optima = np.array([estimate.parameters["Nopt"] for _, estimate in fits])
    spread = np.array([standard_errors(estimate)["Nopt"] for _, estimate in fits]) / optima
    weights, variance = np.ones(len(fits)), float(np.mean(spread**2))
    if weighted and (np.isfinite(spread) & (spread > 0)).all():
        weights, variance = 1 / spread**2 / np.mean(1 / spread**2), float(1 / np.mean(1 / spread**2))
    table = pd.DataFrame({"C": [budget for budget, _ in fits], "y": optima, "weight": weights})
    options = Request("frontier", "C=C,y=y", weights="weight", holdout=request.holdout, seed=request.seed)
    options = replace(options, least_variance=variance if np.isfinite(variance) else 0.0)
    return fitted(LAWS["frontier"], table, table, {"C": "C", "y": "y"}, options)


def isoflop_text(result: Mapping[str, Any]) -> str:
    """Return the budgets as lines for a terminal; the frontier is printed as any law is."""
    lines = [f"isoflop: {LAWS['isoflop'].formula}; n {result['n']}, {len(result['groups'])} budgets"]
    for group in result["groups"]:
        optimum, (low, high) = group["parameters"]["Nopt"], group["intervals"]["Nopt"]
        words = f"  C {group['C']:<10.4g} n {group['n']:<3} Nopt {optimum:<10.4g} [{low:.4g}, {high:.4g}]"
        loss = f" Lmin {group['parameters']['Lmin']:.5g}"
        note = "  not identified: no part in the frontier" if group["C"] in result["unidentified"] else ""
        lines.append(words + loss + note + ("  outside its sizes" if group["C"] in result["outside"] else ""))
    lines.append(f"  intervals: {result['groups'][0]['interval_kind']}")
    lines += [f"  left out: budget {budget}: {reason}" for budget, reason in result["refused"].items()]
    if "reason" in result["frontier"]:
        lines.append(f"  no frontier: it {result['frontier']['reason']}")
    return "\n".join(lines)
