"""IsoFLOP profiles: the parabola of each compute budget, and the optimal sizes over budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.errors import InputError
from analysis.figures import style
from analysis.figures.context import Context, Missing
from analysis.fits.intervals import standard_errors
from analysis.studies.isoflop import IsoFlops, isoflops
from analysis.studies.request import Request


def isoflops_of_grid(context: Context, folder: Path) -> list[Path]:
    """Draw the runs of the reference at equal training FLOPs; sizes are non-embedding parameters."""
    reference = context.data.reference
    table = context.table[(context.table["family"] == reference) & (context.table["train_flops"] > 0)]
    table = table.assign(N=table["params_total"] - table["params_embedding"].fillna(0))
    request = Request("isoflop", "N=N,L=eval_loss", group="train_flops", drop_missing=True)
    try:
        if table.empty:
            raise InputError("no run of the reference")
        profiles = isoflops(table, {"N": "N", "L": "eval_loss"}, request)
    except InputError:
        raise Missing(
            f"grid {context.grid} lacks four sizes of {reference} at one training budget; from any table: "
            "python -m analysis fit --law isoflop --group C --data FILE --columns N=...,L=... --figure FOLDER"
        ) from None
    return isoflop_figure(profiles, folder, f"our runs, grid {context.grid}")


def isoflop_figure(profiles: IsoFlops, folder: Path, source: str) -> list[Path]:
    """Draw the parabolas with their data, the optima, and the frontier with its 95 % interval for the exponent.

    Args:
        profiles: The fits.
        folder: Where the files are written.
        source: The source in the footnote.
    """
    from matplotlib import colormaps

    fits, frontier = profiles.fits, profiles.document["frontier"]
    with style.figure(1, 2, width=7.2, height=3.6) as (drawn, (left, right)):
        for rank, (budget, parabola) in enumerate(fits):
            color = colormaps["viridis"](0.9 * rank / max(len(fits) - 1, 1))
            sizes = parabola.problem.x["N"]
            at = np.geomspace(sizes.min(), sizes.max(), 100)
            left.plot(sizes, parabola.problem.y, "o", color=color, markersize=3)
            left.plot(
                at,
                parabola.predict({"N": at}),
                color=color,
                linewidth=1,
                label=f"{budget:.2g} FLOPs (n={parabola.problem.n})",
            )
            if budget in profiles.usable:
                optimum, error = parabola.parameters["Nopt"], standard_errors(parabola)["Nopt"]
                left.plot([optimum], [parabola.parameters["Lmin"]], "*", color=color, markersize=8)
                reach = [1.96 * min(error, optimum / 2)]
                right.errorbar([budget], [optimum], yerr=reach, fmt="o", color=color)
        if "parameters" in frontier:
            ends = np.array([fits[0][0], fits[-1][0]])
            k, a = frontier["parameters"]["k"], frontier["parameters"]["a"]
            low, high = frontier["intervals"]["a"]
            exponent = f"a = {a:.3f} [{low:.3f}, {high:.3f}]"
            right.plot(ends, k * ends**a, color="#000000", linewidth=1, label=exponent)
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
            "errors; budgets whose optimum is not identified among their sizes have no star and do not enter the law. "
            f"Source: {source}."
        )
        return style.save(drawn, folder, "isoflop", note)
