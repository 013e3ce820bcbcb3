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

from analysis.errors import InputError
from analysis.figures import style
from analysis.figures.scene import Missing, Scene
from analysis.fits.columns import number
from analysis.fits.fit import Fit, fit
from analysis.fits.fitting import Request, data, document
from analysis.fits.intervals import standard_errors
from analysis.fits.laws import LAWS

SAME_BUDGET = 1.05
"""Runs whose FLOPs differ by less than this ratio from the least of them share a budget."""
NOT_BY_BUDGET = ("predict", "cluster", "strata", "holdout_by", "out")


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


def isoflop_document(rows: pd.DataFrame, columns: Mapping[str, str], asked: Request) -> dict[str, Any]:
    """Parabolas by `asked.group` (the compute budget) and the frontier; budgets with too few sizes are listed as
    refused, those whose optimum is not among their sizes as outside."""
    assert asked.group is not None
    for name in NOT_BY_BUDGET:
        if getattr(asked, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: not with --group; fit one budget by --where")
    flops = number(rows, asked.group, "--group")
    if not (np.isfinite(flops).all() and (flops > 0).all()):
        raise InputError(f"--group: {asked.group} is missing, infinite or not above 0 in some rows")
    alone = replace(asked, group=None, figure=None, holdout=0.0)
    groups, fits, refused = [], [], {}
    by_run = budgets(flops)
    for budget in sorted(set(by_run.tolist())):
        part = rows[by_run == budget]
        try:
            posed, _ = data(LAWS["isoflop"], part, columns, alone)
            fits.append((budget, fit(posed, asked.seed)))
            groups.append({"C": budget, **document(LAWS["isoflop"], part, rows, columns, alone)})
        except InputError as error:
            refused[f"{budget:.4g}"] = str(error)
    if not groups:
        raise InputError(f"--group: none of {len(refused)} budgets can be fitted: {next(iter(refused.values()))}")
    result: dict[str, Any] = {
        "law": "isoflop",
        "n": sum(group["n"] for group in groups),
        "groups": groups,
        "refused": refused,
        "outside": [budget for budget, found in fits if not _inside(found)],
        "frontier": _frontier([item for item in fits if _inside(item[1])], asked),
    }
    if asked.figure is not None:
        result["figure"] = [str(path) for path in isoflop_figure(fits, result["frontier"], asked)]
    return result


def _inside(found: Fit) -> bool:
    """Whether the optimum lies among the sizes tried; one that does not is an extrapolation and no evidence."""
    sizes = found.problem.x["N"]
    return bool(sizes.min() < found.parameters["Nopt"] < sizes.max())


def _frontier(fits: list[tuple[float, Fit]], asked: Request) -> dict[str, Any]:
    """Nopt against C over budgets whose optimum is among their sizes."""
    if len(fits) < 3:
        return {"n": len(fits), "reason": "needs three budgets whose optimum lies among their sizes"}
    optima = np.array([found.parameters["Nopt"] for _, found in fits])
    spread = np.array([standard_errors(found)["Nopt"] for _, found in fits]) / optima
    weights = np.ones(len(fits))
    if (np.isfinite(spread) & (spread > 0)).all():
        weights = 1 / spread**2 / np.mean(1 / spread**2)
    table = pd.DataFrame({"C": [budget for budget, _ in fits], "y": optima, "weight": weights})
    plain = Request("frontier", "C=C,y=y", weights="weight", holdout=asked.holdout, seed=asked.seed)
    return document(LAWS["frontier"], table, table, {"C": "C", "y": "y"}, plain)


def isoflop_text(result: Mapping[str, Any]) -> str:
    """The budgets as lines for a terminal; the frontier is printed as any law is."""
    lines = [f"isoflop: {LAWS['isoflop'].formula}; n {result['n']}, {len(result['groups'])} budgets"]
    for group in result["groups"]:
        optimum, (low, high) = group["parameters"]["Nopt"], group["intervals"]["Nopt"]
        words = f"  C {group['C']:<10.4g} n {group['n']:<3} Nopt {optimum:<10.4g} [{low:.4g}, {high:.4g}]"
        loss = f" Lmin {group['parameters']['Lmin']:.5g}"
        known = "" if group["identified"]["Nopt"] else "  not identified"
        lines.append(words + loss + known + ("  outside its sizes" if group["C"] in result["outside"] else ""))
    lines.append(f"  intervals: {result['groups'][0]['interval_kind']}")
    lines += [f"  left out: budget {budget}: {reason}" for budget, reason in result["refused"].items()]
    if "reason" in result["frontier"]:
        lines.append(f"  no frontier: it {result['frontier']['reason']}")
    return "\n".join(lines)


def isoflops_of_grid(found: Scene, folder: Path) -> list[Path]:
    """The dense runs of a grid at equal training FLOPs, sizes being non-embedding parameters."""
    table = found.table[(found.table["family"] == "dense") & (found.table["train_flops"] > 0)]
    table = table.assign(N=table["params_total"] - table["params_embedding"].fillna(0))
    asked = Request(
        "isoflop",
        "N=N,L=eval_loss",
        group="train_flops",
        figure=folder,
        drop_missing=True,
        source=f"our runs, grid {found.grid}",
    )
    try:
        if table.empty:
            raise InputError("no dense run")
        return [Path(path) for path in isoflop_document(table, {"N": "N", "L": "eval_loss"}, asked)["figure"]]
    except InputError:
        raise Missing(
            f"grid {found.grid} has no four sizes of dense at one training budget; from any table: "
            "python -m analysis fit --law isoflop --group C --data FILE --columns N=...,L=... --figure FOLDER"
        ) from None


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
                at,
                found.predict({"N": at}),
                color=color,
                linewidth=1,
                label=f"{budget:.2g} FLOPs (n={found.problem.n})",
            )
            if _inside(found):
                optimum, error = found.parameters["Nopt"], standard_errors(found)["Nopt"]
                left.plot([optimum], [found.parameters["Lmin"]], "*", color=color, markersize=8)
                reach = [1.96 * min(error, optimum / 2)]
                right.errorbar([budget], [optimum], yerr=reach, fmt="o", color=color)
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
        style.legend_above(drawn, [left])
        right.set_xlabel("training FLOPs")
        right.set_ylabel("optimal parameters")
        note = (
            "Left: runs and a parabola in ln N per budget, stars at the optima. Right: optima with 1.96 standard "
            "errors; budgets whose optimum is outside the sizes tried have no star and no part in the law. "
            f"Source: {asked.source}."
        )
        return style.save(drawn, asked.figure, "isoflop", note)
