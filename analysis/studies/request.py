"""The options of a fit, checked, and the problem and held-out cells that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.columns import chosen, evaluate, groups, number, numbers, problem
from analysis.fits.intervals import HeldOut, hold_out, no_hold_out
from analysis.fits.problem import Problem
from analysis.laws.builtin import law
from analysis.laws.formula import formula_law
from analysis.laws.law import Law
from analysis.laws.law_files import read_law

FORMULA = "formula"
"""The name of the law that `--formula` gives."""


@dataclass(frozen=True)
class Request:
    """A fit and its reports; the fields are the options of `python -m analysis fit`."""

    law: str
    columns: str
    huber: float | None = None
    minimize: str = "sum"
    residuals: str | None = None
    where: str | None = None
    predict: str | None = None
    drop_highest: int = 0
    drop_missing: bool = False
    weights: str | None = None
    cluster: str | None = None
    strata: str | None = None
    bootstrap: int = 0
    holdout: float = 0.1
    holdout_by: str | None = None
    fix: Mapping[str, float] | None = None
    seed: int = 0
    diagnostics: bool = False
    figure: Path | None = None
    group: str | None = None
    out: Path | None = None
    source: str = ""
    formula: str | None = None
    parameters: str = ""
    least_variance: float = 0.0

    @property
    def label(self) -> str:
        """What to call the law in a table: its name, or its formula."""
        return self.formula if self.law == FORMULA and self.formula else Path(self.law).stem


def check(request: Request) -> None:
    """Raise InputError for an option outside its range."""
    if request.huber is not None and not request.huber > 0:
        raise InputError(f"--huber: got {request.huber:g}, allowed: above 0")
    if not 0 <= request.holdout < 1:
        raise InputError(f"--holdout: got {request.holdout:g}, allowed: 0 to below 1")
    for name in ("bootstrap", "drop_highest", "seed"):
        if getattr(request, name) < 0:
            raise InputError(f"--{name.replace('_', '-')}: got {getattr(request, name)}, allowed: 0 or more")
    for name, allowed in (("minimize", ("sum", "mean")), ("residuals", ("log", "linear", None))):
        if getattr(request, name) not in allowed:
            words = ", ".join(value for value in allowed if value)
            raise InputError(f"--{name}: got {getattr(request, name)!r}, allowed: {words}")
    for name in ("cluster", "strata"):
        if getattr(request, name) is not None and not request.bootstrap:
            raise InputError(f"--{name}: controls how the bootstrap resamples; it needs --bootstrap DRAWS")


def chosen_law(name: str, columns: Mapping[str, str], request: Request) -> Law:
    """Return the law with the requested scale of residuals; by default, Huber's loss applies to logarithms.

    Args:
        name: Name of the law.
        columns: Expression of each input and of the output.
        request: The options of the fit.
    """
    equation = named_law(name, columns, request)
    unknown = sorted(set(columns) - {*equation.inputs, equation.output})
    if unknown:
        raise InputError(
            f"--columns: got {unknown[0]!r}, allowed for law {name}: {', '.join([*equation.inputs, equation.output])}"
        )
    scale = request.residuals or ("log" if request.huber is not None else equation.residuals)
    return replace(equation, residuals=scale)  # type: ignore[arg-type]


def named_law(name: str, columns: Mapping[str, str], request: Request) -> Law:
    """Return the built-in law of that name, the law of a file, or the requested formula.

    Args:
        name: Name of a built-in law, path of a law file, or `FORMULA`.
        columns: Expressions by name; names outside them are parameters.
        request: The options of the fit.
    """
    if name == FORMULA:
        if request.formula is None:
            raise InputError("--law formula: needs --formula")
        return formula_law(request.formula, list(columns), request.parameters, residuals=request.residuals)
    if request.parameters:
        raise InputError("--parameters: only with --formula; a law file has its own")
    if name.endswith((".yaml", ".yml")):
        return read_law(Path(name), list(columns))
    return law(name, set(columns))


def data(
    equation: Law, rows: pd.DataFrame, columns: Mapping[str, str], request: Request
) -> tuple[Problem, pd.DataFrame]:
    """Return the problem and the rows that it uses.

    Args:
        equation: The law.
        rows: The candidate rows of the user's table.
        columns: Expression of each input and of the output.
        request: Which rows to drop, the loss, the weights and the fixed parameters.

    Raises:
        InputError: The rows cannot be fitted.
    """
    wanted = {name: columns[name] for name in [*equation.inputs, equation.output] if name in columns}
    frame, _ = numbers(rows, wanted, request.drop_missing)
    if request.drop_highest and equation.output in frame:
        frame = frame.sort_values(equation.output, kind="stable").iloc[: max(0, len(frame) - request.drop_highest)]
        frame = frame.sort_index()
    used = rows.loc[frame.index]
    weights = None
    if request.weights is not None:
        weights = number(used, request.weights, "--weights")
    delta = math.inf if request.huber is None else request.huber
    posed = problem(equation, frame, delta, weights, request.fix)
    return replace(posed, least_variance=request.least_variance), used


def held_out(posed: Problem, used: pd.DataFrame, request: Request) -> HeldOut:
    """Return predictions of the largest cells by a fit to the rest; none if the share is 0.

    Args:
        posed: The problem.
        used: Its rows of the table.
        request: The options of the fit.
    """
    if request.holdout == 0:
        return no_hold_out("", "--holdout 0")
    share = request.holdout
    if request.holdout_by is None:
        size, rule = posed.law.size(posed.x), f"largest by the size of law {posed.law.name}"
    elif evaluate(used, request.holdout_by, "--holdout-by").dtype == bool:
        declared = chosen(used, request.holdout_by, "--holdout-by").index
        size, rule, share = used.index.isin(declared).astype(float), f"where {request.holdout_by}", 1 / len(used)
    else:
        size, rule = number(used, request.holdout_by, "--holdout-by"), f"largest {request.holdout_by}"
        if not np.isfinite(size).all():
            raise InputError(f"--holdout-by: {request.holdout_by} is missing or infinite in some rows")
    clusters = groups(used, request.cluster, "--cluster")
    if clusters is not None:  # all checkpoints of a run are held out together
        size, rule = pd.Series(size).groupby(clusters).transform("max").to_numpy(), f"{rule}, whole {request.cluster}"
    return hold_out(posed, size, share, rule, request.seed)
