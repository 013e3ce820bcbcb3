"""The `fit` verb: a law fitted to any table, or the trends of a grid's outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.options import (
    COLUMNS,
    REFERENCE,
    AsJson,
    Data,
    FitOptions,
    Fix,
    Formula,
    Grid,
    Parameters,
    Results,
    assignments,
    expand_options,
    print_json,
)
from analysis.errors import InputError
from analysis.laws.builtin import LAWS

if TYPE_CHECKING:
    import pandas as pd

    from analysis.studies.document import Fitted
    from analysis.studies.request import Request

EXAMPLE = (
    "Example: python -m analysis fit --law chinchilla --data runs.csv "
    '--columns "N=params,D=tokens,L=loss" --huber 1e-3 --json'
)


@expand_options
def fit(
    options: FitOptions,
    law: Annotated[
        str | None,
        typer.Option(help=f"a law file (.yaml), joint (selects one of joint1 to joint4), or one of {', '.join(LAWS)}"),
    ] = None,
    formula: Formula = None,
    parameters: Parameters = "",
    data: Data = None,
    columns: Annotated[str | None, typer.Option(help=COLUMNS)] = None,
    minimize: Annotated[str, typer.Option(metavar="sum|mean", help="the objective: sum or mean over points")] = "sum",
    predict: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="predict rows that satisfy this, with relative errors")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="EXPR", help="what identifies a run: resample and hold out whole runs")
    ] = None,
    strata: Annotated[str | None, typer.Option(metavar="EXPR", help="resample within these groups (cells)")] = None,
    bootstrap: Annotated[
        int, typer.Option(metavar="DRAWS", help="number of refits for intervals; 0: profile intervals")
    ] = 0,
    holdout: Annotated[
        float, typer.Option(metavar="SHARE", help="share of the cells to hold out, largest first")
    ] = 0.1,
    holdout_by: Annotated[
        str | None, typer.Option(metavar="EXPR", help="the size of a cell, or a condition on the rows to hold out")
    ] = None,
    fix: Fix = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="EXPR", help="with --law isoflop: the compute budget of each run; adds the frontier"),
    ] = None,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="add residual, leverage and leave-one-out fit of each point")
    ] = False,
    by: Annotated[str | None, typer.Option(metavar="EXPR", help="fit each group of rows; see --shared")] = None,
    shared: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="with --by: parameters that all groups share; adds an F test"),
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="DIR", help="draw the fit there: PNG, PDF, SVG")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="with --data: write the table with columns predicted and fitted"),
    ] = None,
    results: Results = Path("results"),
    grid: Grid = None,
    as_json: AsJson = False,
) -> int:
    """Fit a law to any table of runs; without --law, fit the trends of a grid's outcomes."""
    if formula is not None:
        if law is not None:
            raise InputError("--formula: not allowed together with --law")
        law = "formula"
    if law is None and data is None:
        if out is not None:
            raise InputError("--out: allowed only with --law, --data and --columns")
        return _trends(results, grid, as_json)
    if law is None or data is None or columns is None:
        missing = "law" if law is None else "data" if data is None else "columns"
        raise InputError(f"--{missing}: missing; a fit to a file needs --law or --formula, --data and --columns")
    from analysis.records.tables import check_target, read_table
    from analysis.studies.request import Request

    _refuse_unwritten(by, group, out, figure)
    if out is not None:
        check_target(out)  # before a fit that may take long
    request = Request(
        law=law,
        formula=formula,
        parameters=parameters,
        columns=columns,
        minimize=minimize,
        predict=predict,
        cluster=cluster,
        strata=strata,
        bootstrap=bootstrap,
        holdout=holdout,
        holdout_by=holdout_by,
        fix=assignments(fix or (), "--fix"),
        diagnostics=diagnostics,
        figure=figure,
        group=group,
        out=out,
        source=data.name,
        **options.fields(),
    )
    if by is not None or shared is not None:
        return _groups(read_table(data), request, by, shared, as_json)
    document = run(read_table(data), request)
    if as_json:
        print_json(document)
    else:
        print(_text(document))
    return 0


def _refuse_unwritten(by: str | None, group: str | None, out: Path | None, figure: Path | None) -> None:
    """Raise InputError for a file that fits of several groups do not write.

    Args:
        by: --by.
        group: --group.
        out: --out.
        figure: --figure, which --group supports.
    """
    for name, value, others in (("--out", out, {"--by": by, "--group": group}), ("--figure", figure, {"--by": by})):
        for other, expression in others.items():
            if value is not None and expression is not None:
                raise InputError(f"{name}: not allowed together with {other}")


def run(table: pd.DataFrame, request: Request) -> dict[str, Any]:
    """Fit, draw and write what is requested; returns the document that `fit --json` prints."""
    from analysis.fits.columns import chosen, expressions, prepared
    from analysis.studies.document import fitted
    from analysis.studies.request import check, chosen_law
    from analysis.studies.select import select_joint

    check(request)
    original, table = table.reset_index(drop=True), prepared(table)
    columns = expressions(request.columns)
    rows = chosen(table, request.where, "--where")
    if request.group is not None:
        return _isoflops(rows, columns, request)
    if request.law == "joint":
        fits = select_joint(rows, table, columns, request)
    else:
        fits = [fitted(chosen_law(request.law, columns, request), rows, table, columns, request)]
    for item in fits:
        _draw(item, request)
    if request.out is not None:
        _write(fits[0], original, table, columns, request.out)
    return fits[0].document


def _isoflops(rows: pd.DataFrame, columns: Mapping[str, str], request: Request) -> dict[str, Any]:
    from analysis.studies.isoflop import isoflops

    if request.law != "isoflop":
        raise InputError(f"--group: got law {request.law!r}, allowed: isoflop")
    profiles = isoflops(rows, columns, request)
    if request.figure is not None:
        from analysis.figures.isoflop import isoflop_figure

        profiles.document["figure"] = [str(path) for path in isoflop_figure(profiles, request.figure, request.source)]
    return profiles.document


def _groups(table: pd.DataFrame, request: Request, by: str | None, shared: str | None, as_json: bool) -> int:
    """Fits by group, with shared parameters where requested."""
    from analysis.studies.groups import fit_groups, text

    if by is None:
        raise InputError("--shared: only with --by")
    document = fit_groups(table, request, by, [name.strip() for name in (shared or "").split(",") if name.strip()])
    if as_json:
        print_json(document)
    else:
        print(text(document))
    return 0


def _draw(item: Fitted, request: Request) -> None:
    """Draw the fit and list its files in the document."""
    if request.figure is None:
        return
    from analysis.figures.curves import curves_figure
    from analysis.figures.law import law_figure

    source = f"Source: {request.source}." if request.source else ""
    drawn = law_figure(item.estimate, item.held, request.figure, source)
    drawn += curves_figure(item.estimate, item.profiles, request.figure, source)
    item.document["figure"] = [str(path) for path in drawn]


def _write(item: Fitted, original: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], out: Path) -> None:
    from analysis.records.tables import write_table
    from analysis.studies.document import predicted_rows

    write_table(original.assign(**predicted_rows(item, table, columns)), out)


def _text(document: Mapping[str, Any]) -> str:
    """Return the document as lines for a terminal."""
    from analysis.studies.document import text
    from analysis.studies.isoflop import isoflop_text

    if "groups" in document:
        names = ("frontier", "frontier_unweighted")
        frontiers = {name: document[name] for name in names if "parameters" in document[name]}
        parts = [f"{name.replace('_', ', ')}:\n{text(item)}" for name, item in frontiers.items()]
        return "\n".join([isoflop_text(document), *parts])
    lines = [text(item) for item in document.get("candidates") or [document]]
    if "selected" in document:
        lines += [f"left out: {name}: {reason}" for name, reason in document["refused"].items()]
        lines.append(f"selected: {document['selected']} ({document['rule']})")
    return "\n".join(lines)


def _trends(results: Path, grid: str | None, as_json: bool) -> int:
    """Return the log-linear fits of a grid's outcomes."""
    from analysis.comparisons.trends import trends
    from analysis.records.grid_data import load

    fits = trends(load(results, grid, fallback=REFERENCE))
    if as_json:
        print_json({"grid": grid, "fits": [asdict(trend) for trend in fits]})
        return 0
    for trend in fits:
        print(f"{trend.outcome}, {trend.variant}: {trend.runs} runs, {trend.cells} cells")
        for term, (estimate, low, high) in trend.estimates.items():
            interval = "no interval: cells of one run" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]"
            print(f"  {term}: {estimate:.4g} {interval}")
        unidentified, score = ", ".join(trend.not_identified) or "none", "too few cells"
        if trend.held_out:
            score = f"{trend.held_out['cell']}, relative error {float(trend.held_out['relative_error']):+.2%}"
        print(f"  not identified: {unidentified}; held out: {score}")
    return 0
