"""The verbs `predict`, `optimum` and `select`: what follows from a fit, and which law to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.options import (
    AsJson,
    Columns,
    FitOptions,
    Fix,
    Formula,
    LawName,
    Parameters,
    TableFile,
    assignments,
    expand_options,
    print_json,
)
from analysis.errors import InputError

if TYPE_CHECKING:
    from analysis.studies.document import Fitted
    from analysis.studies.request import Request

PREDICT = (
    "Example: python -m analysis predict --law chinchilla --data runs.csv "
    '--columns "N=params,D=tokens,L=loss" --at N=7e9,D=1.4e12'
)
OPTIMUM = (
    "Example: python -m analysis optimum --law chinchilla --data runs.csv "
    '--columns "N=params,D=tokens,L=loss" --budget 1e21,1e22'
)
SELECT = (
    "Example: python -m analysis select --law chinchilla --law outer --data runs.csv "
    '--columns "N=params,D=tokens,L=loss" --size params'
)


@expand_options
def predict(
    options: FitOptions,
    data: TableFile,
    columns: Columns,
    law: LawName = None,
    formula: Formula = None,
    parameters: Parameters = "",
    at: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE,...", help="a point; repeatable")] = None,
    points: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a table of points with the law's inputs as columns")
    ] = None,
    fix: Fix = None,
    as_json: AsJson = False,
) -> int:
    """Predict new points, with 95 % intervals of the law and of a new run."""
    from analysis.studies.predict import predictions, text

    request = _request(law, formula, parameters, columns, fix, options)
    wanted = [assignments(item.split(","), "--at") for item in at or ()]
    item = _fitted(data, request)
    wanted += _points(points, list(item.estimate.problem.law.inputs))
    if not wanted:
        raise InputError("--at: missing; name a point, as in --at N=7e9,D=1.4e12, or a table of them by --points")
    predicted = predictions(item.estimate, item.profiles, wanted)
    document = {"law": item.document["law"], "fit": item.document, "predictions": predicted}
    if as_json:
        print_json(document)
    else:
        print(f"{_title(item)}\n{text(predicted)}")
    return 0


@expand_options
def optimum(
    options: FitOptions,
    data: TableFile,
    columns: Columns,
    budget: Annotated[str, typer.Option(metavar="FLOPS,...", help="training FLOPs to allocate")],
    law: LawName = None,
    formula: Formula = None,
    parameters: Parameters = "",
    flops: Annotated[str, typer.Option(help="training FLOPs as a formula of N and D")] = "6*N*D",
    at: Annotated[str | None, typer.Option(metavar="NAME=VALUE,...", help="inputs other than N and D")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="also the loss at this many tokens per parameter (over-training)")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="EXPR", help="with --law isoflop: the compute budget of each run")
    ] = None,
    fix: Fix = None,
    as_json: AsJson = False,
) -> int:
    """Find the compute-optimal N and D of a budget with 95 % intervals, from a law or from isoFLOP profiles."""
    from analysis.studies.optimum import flops_formula, text
    from analysis.studies.optimum import optimum as best

    request = _request(law, formula, parameters, columns, fix, options)
    cost, budgets = flops_formula(flops), _budgets(budget)
    if request.law == "isoflop":
        item, optima = _from_isoflops(data, replace(request, group=group), cost, budgets)
    else:
        if group is not None:
            raise InputError("--group: only with --law isoflop")
        item = _fitted(data, request)
        others = assignments(at.split(",") if at else (), "--at")
        optima = [best(item.estimate, item.profiles, value, cost, others, ratio) for value in budgets]
    document = {"law": request.label, "flops": flops, "fit": item.document, "optima": optima}
    if as_json:
        print_json(document)
    else:
        print(f"{_title(item)}; FLOPs {flops}\n{text(optima)}")
    return 0


@expand_options
def select(
    options: FitOptions,
    data: TableFile,
    columns: Columns,
    law: Annotated[list[str] | None, typer.Option(help="a built-in law or a law file; repeatable")] = None,
    formula: Annotated[list[str] | None, typer.Option(help="a law of your own; repeatable")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option(help="as for fit; one for each --formula, in the same order")
    ] = None,
    size: Annotated[str, typer.Option(metavar="EXPR", help="the size by which cells are held out")] = "",
    blocks: Annotated[int, typer.Option(help="number of blocks of sizes to predict in turn")] = 4,
    as_json: AsJson = False,
) -> int:
    """Compare laws by rolling hold-out: fit the smaller sizes, predict the next ones."""
    from analysis.fits.columns import chosen, expressions, prepared
    from analysis.records.tables import read_table
    from analysis.studies.request import FORMULA, Request, check
    from analysis.studies.select import select as compare
    from analysis.studies.select import select_text

    if not size:
        raise InputError("--size: missing; an expression of the table's columns by which cells are held out")
    if blocks < 1:
        raise InputError(f"--blocks: got {blocks}, allowed: 1 or more")
    if parameters and len(parameters) != len(formula or ()):
        raise InputError(f"--parameters: got {len(parameters)}, allowed: one for each --formula, in their order")
    rules = parameters or [""] * len(formula or ())
    requests = [Request(law=name, columns=columns, **options.fields()) for name in law or ()]
    requests += [
        Request(law=FORMULA, formula=text, parameters=rule, columns=columns, **options.fields())
        for text, rule in zip(formula or (), rules, strict=True)
    ]
    if not requests:
        raise InputError("--law: missing; name the laws to compare by --law and --formula")
    check(requests[0])
    rows = chosen(prepared(read_table(data)), options.where, "--where")
    document = compare(rows, expressions(columns), requests, size, blocks)
    if as_json:
        print_json(document)
    else:
        print(select_text(document))
    return 0


def _request(
    law: str | None, formula: str | None, parameters: str, columns: str, fix: list[str] | None, options: FitOptions
) -> Request:
    """Return the request of a fit to a file without hold-out."""
    from analysis.studies.request import FORMULA, Request

    if (law is None) == (formula is None):
        raise InputError("--law: one of --law and --formula is needed")
    return Request(
        law or FORMULA,
        columns,
        formula=formula,
        parameters=parameters,
        holdout=0.0,
        fix=assignments(fix or (), "--fix"),
        **options.fields(),
    )


def _fitted(data: Path, request: Request) -> Fitted:
    """Return the fit of a request to a file."""
    from analysis.fits.columns import chosen, expressions, prepared
    from analysis.records.tables import read_table
    from analysis.studies.document import fitted
    from analysis.studies.request import check, chosen_law

    check(request)
    table, columns = prepared(read_table(data)), expressions(request.columns)
    rows = chosen(table, request.where, "--where")
    return fitted(chosen_law(request.law, columns, request), rows, table, columns, request)


def _points(path: Path | None, inputs: list[str]) -> list[dict[str, float]]:
    """Return the points of a table whose columns are a law's inputs."""
    from analysis.fits.columns import number, prepared
    from analysis.records.tables import read_table

    if path is None:
        return []
    table = prepared(read_table(path))
    missing = [name for name in inputs if name not in table.columns]
    if missing:
        raise InputError(f"--points {path}: column {missing[0]} is missing, needed: {', '.join(inputs)}")
    values = {name: number(table, f"`{name}`", f"--points {path}") for name in inputs}
    return [{name: float(values[name][row]) for name in inputs} for row in range(len(table))]


def _budgets(text: str) -> list[float]:
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise InputError(f"--budget: got {part!r}, allowed: numbers above 0, separated by commas") from None
        if not 0 < value < float("inf"):
            raise InputError(f"--budget: got {part!r}, allowed: numbers above 0")
        values.append(value)
    return values


def _from_isoflops(
    data: Path, request: Request, cost: Any, budgets: Sequence[float]
) -> tuple[Fitted, list[dict[str, Any]]]:
    """Return the frontier through isoFLOP optima, and its size at each budget."""
    from analysis.fits.columns import chosen, expressions, prepared
    from analysis.records.tables import read_table
    from analysis.studies.isoflop import isoflops
    from analysis.studies.optimum import from_frontier
    from analysis.studies.request import check

    if request.group is None:
        raise InputError("--group: missing; with --law isoflop, the compute budget of each run")
    check(request)
    rows = chosen(prepared(read_table(data)), request.where, "--where")
    profiles = isoflops(rows, expressions(request.columns), request)
    if profiles.frontier is None:
        raise InputError(f"optimum: {profiles.document['frontier']['reason']}")
    item = profiles.frontier
    return item, [from_frontier(item.estimate, item.profiles, value, cost) for value in budgets]


def _title(item: Fitted) -> str:
    fit = item.estimate
    values = ", ".join(f"{name} {value:.5g}" for name, value in fit.parameters.items())
    return f"{fit.problem.law.name}: {fit.problem.law.formula}; n {fit.problem.n}; {values}"
