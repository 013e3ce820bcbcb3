"""Everything the `fit` verb reports about one law on one set of rows: a JSON document, and its text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.columns import chosen, groups, number, numbers
from analysis.fits.fit import AGREED, Fit, fit
from analysis.fits.intervals import (
    Bootstrap,
    HeldOut,
    bootstrap,
    leave_one_out,
    leverage,
    standard_errors,
)
from analysis.fits.problem import Problem
from analysis.fits.profile import Ends, identified, profiled
from analysis.laws.law import Law, Parameter
from analysis.studies.request import Request, data, held_out

LEFT_OUT = 3000
FEW_DRAWS = 100


@dataclass(frozen=True)
class Fitted:
    """A fit, its held-out score, the rows it used and the JSON document that `fit --json` prints for it."""

    estimate: Fit
    held: HeldOut
    used: pd.DataFrame
    profiles: Ends
    document: dict[str, Any]


def fitted(law: Law, rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], request: Request) -> Fitted:
    """Fit one law and report on it.

    Args:
        law: The law.
        rows: The rows to fit.
        table: The whole table, of which `request.predict` selects rows to predict.
        columns: Expression of each input and of the output.
        request: The options of the fit.
    """
    posed, used = data(law, rows, columns, request)
    held = held_out(posed, used, request)
    estimate, profiles = profiled(fit(posed, request.seed))
    _check_sign(estimate)
    closed = identified(estimate.problem, profiles)
    draws = _bootstrap(estimate, used, request)
    divisor = posed.n if request.minimize == "mean" else 1
    result: dict[str, Any] = {
        "law": law.name,
        "formula": law.formula,
        "source": law.source,
        "n": posed.n,
        "parameters": estimate.parameters,
        "meaning": {p.name: p.meaning for p in law.parameters},
        "objective": estimate.objective / divisor,
        "minimize": request.minimize,
        "residuals": law.residuals,
        "huber": request.huber,
        "seed": request.seed,
        "intervals": {p.name: list(draws.interval(p.name) if draws else profiles[p.name]) for p in posed.free},
        "interval_kind": f"95 %, from {draws.completed} bootstrap refits" if draws else "95 % profile",
        "profile": {name: list(ends) for name, ends in profiles.items()},
        "standard_errors": {n: draws.standard_error(n) for n in profiles} if draws else standard_errors(estimate),
        "identified": closed,
        "at_bound": {name: bound if math.isfinite(bound) else "infinity" for name, bound in estimate.at_bound.items()},
        "bounds": {p.name: [p.low, p.high] for p in posed.free},
        "holdout": _held_json(held, law),
        "fixed": dict(posed.fixed),
        "warnings": [*_row_warnings(posed, used, rows, request), *_warnings(estimate, closed, profiles, draws, held)],
    }
    if request.predict is not None:
        result["predictions"] = _predictions(estimate, law, chosen(table, request.predict, "--predict"), columns)
    if request.diagnostics:
        result["diagnostics"] = _diagnostics(estimate, used)
    return Fitted(estimate, held, used, profiles, result)


def _bootstrap(estimate: Fit, used: pd.DataFrame, request: Request) -> Bootstrap | None:
    if not request.bootstrap:
        return None
    clusters, strata = groups(used, request.cluster, "--cluster"), groups(used, request.strata, "--strata")
    _check_resampling(estimate, clusters, strata)
    return bootstrap(estimate, request.bootstrap, request.seed, clusters, strata)


def _check_resampling(estimate: Fit, clusters: np.ndarray | None, strata: np.ndarray | None) -> None:
    """Check for more runs than parameters, each in one stratum, and for strata with something to draw."""
    units = np.arange(estimate.problem.n) if clusters is None else clusters
    free, distinct = len(estimate.problem.free), len(np.unique(units))
    if distinct <= free:
        raise InputError(f"--cluster: {distinct} groups are too few to resample for {free} parameters")
    if strata is None:
        return
    pairs = pd.DataFrame({"unit": units, "stratum": strata}).drop_duplicates()
    if pairs["unit"].duplicated().any():
        name = pairs["unit"][pairs["unit"].duplicated()].iloc[0]
        raise InputError(f"--strata: group {name!r} of --cluster lies in more than one stratum")
    if (pairs["stratum"].value_counts() == 1).all():
        raise InputError("--strata: every stratum holds a single run, so there is nothing to resample")


def _held_json(held: HeldOut, law: Law) -> dict[str, Any]:
    if not len(held.rows):
        return {"n": 0, "reason": held.reason}
    errors = held.relative_errors
    return {
        "n": len(held.rows),
        "rule": held.rule,
        "rms_log_error": held.rms_log,
        "rms_error": held.rms,
        "mean_relative_error": float(errors.mean()),
        "mean_abs_relative_error": float(np.abs(errors).mean()),
        "max_abs_relative_error": float(np.abs(errors).max()),
    }


def _open(parameter: Parameter, estimate: Fit, ends: tuple[float, float]) -> str:
    """Return why a parameter's interval is one-sided or open."""
    name = parameter.name
    reason = f"{parameter.at_bound}, " if parameter.at_bound and ends[0] <= parameter.low else ""
    if name in estimate.at_bound:
        bound = estimate.at_bound[name]
        limit = bound in (0.0, math.inf) and parameter.log
        where = f"tends to its limit {bound:g}" if limit else f"is at its bound {bound:g}"
        return f"{name}: not identified; it {where} ({reason}95 % profile {_range(parameter, ends)})"
    return f"{name}: not identified ({reason}95 % profile {_range(parameter, ends)})"


def _range(parameter: Parameter, ends: Sequence[float | None]) -> str:
    """Return an interval as text: one-sided where one end is the parameter's bound."""
    low, high = (math.nan if end is None else end for end in ends)
    lowest, highest = low <= parameter.low, high >= parameter.high
    if lowest and highest:
        return "open on both sides"
    if lowest:
        return f"one-sided, at most {high:.6g}"
    return f"one-sided, at least {low:.6g}" if highest else f"[{low:.6g}, {high:.6g}]"


def _row_warnings(posed: Problem, used: pd.DataFrame, rows: pd.DataFrame, request: Request) -> list[str]:
    """Return warnings about rows that are dropped or repeated."""
    lines = []
    dropped = len(rows) - len(used) - request.drop_highest
    if request.drop_missing and dropped > 0:
        lines.append(f"{dropped} of {len(rows)} rows have missing or infinite values and are left out")
    points = pd.DataFrame({**posed.x, "": posed.y}, index=used.index)
    if (repeated := points.duplicated()).any():
        lines.append(
            f"{int(repeated.sum())} of {len(used)} rows repeat another one (first: row {points.index[repeated][0]}):"
            " intervals are narrower than those of the distinct rows"
        )
    return lines


def _warnings(
    estimate: Fit,
    closed: Mapping[str, bool],
    profiles: Mapping[str, tuple[float, float]],
    draws: Bootstrap | None,
    held: HeldOut,
) -> list[str]:
    """Return warnings about the fit and its intervals."""
    lines = [_open(p, estimate, profiles[p.name]) for p in estimate.problem.free if not closed[p.name]]
    n, free = estimate.problem.n, len(estimate.problem.free)
    if not _beats_a_constant(estimate):
        lines.append("the law fits no better than a constant (an F test at 5 %): these data show nothing of its form")
    if estimate.problem.different == free:
        lines.append(f"as many different points as parameters ({free}): the form of the law is not tested")
    if n < 2 * free:
        lines.append(f"{n} points for {free} parameters: intervals are wide or open, and a bootstrap is unreliable")
    if draws is not None and draws.requested < FEW_DRAWS:
        lines.append(f"{draws.requested} bootstrap draws are too few for the ends of a 95 % interval; 1000 are usual")
    if draws is not None and draws.completed < draws.requested:
        lines.append(
            f"{draws.requested - draws.completed} of {draws.requested} bootstrap draws had too few distinct points"
        )
    if estimate.agreeing < min(AGREED, len(estimate.bank) - 1):
        lines.append(
            f"only {estimate.agreeing} of {len(estimate.bank)} starts reached the optimum: a better one may exist"
        )
    if not len(held.rows):
        lines.append(f"nothing held out: {held.reason}")
    return lines


def _beats_a_constant(estimate: Fit) -> bool:
    """Return whether an F test at 5 % prefers the law to one value for all points; True where it cannot be made."""
    from scipy.special import fdtrc

    problem = estimate.problem
    first, second = estimate.dimension - 1, problem.n - estimate.dimension
    if math.isfinite(problem.delta) or first < 1 or second < 1 or not estimate.objective > 0:
        return True
    y = np.log(problem.y) if problem.law.residuals == "log" else problem.y
    alone = 0.5 * float((problem.w * (y - np.average(y, weights=problem.w)) ** 2).sum())
    f = max(alone - estimate.objective, 0.0) / first / (estimate.objective / second)
    return bool(fdtrc(first, second, f) < 0.05)


def _check_sign(estimate: Fit) -> None:
    """Refuse a law of one sign for an outcome of the other."""
    y, law = estimate.problem.y, estimate.problem.law
    if (y < 0).all() and (estimate.predict(estimate.problem.x) >= 0).all():
        raise InputError(
            f"--columns: {law.output} is negative in every row, and law {law.name} with its bounds gives no negative "
            "value; let its offset be negative by --formula and --parameters 'E free'"
        )


def _predictions(estimate: Fit, law: Law, rows: pd.DataFrame, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return predictions of rows of the table; observed value and relative error are null where the row has none."""
    frame, index = numbers(rows, {name: columns[name] for name in law.inputs}, drop_missing=False)
    predicted = estimate.predict({name: frame[name].to_numpy(float) for name in law.inputs})
    observed = number(rows, columns[law.output], f"--columns: {law.output}")
    return [
        {"row": row, "predicted": float(p), "observed": float(o), "relative_error": float(p / o - 1)}
        for row, p, o in zip(index, predicted, observed, strict=True)
    ]


def predicted_rows(item: Fitted, table: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return, for every row of the table, `predicted` (NaN where an input is missing) and whether it was `fitted`.

    Args:
        item: The fit.
        table: The table.
        columns: Expression of each input.
    """
    law = item.estimate.problem.law
    inputs = {name: number(table, columns[name], f"--columns: {name}") for name in law.inputs}
    closed = np.isfinite(np.stack(list(inputs.values()))).all(0)
    predicted = np.where(closed, item.estimate.predict(inputs), np.nan)
    return {"predicted": predicted, "fitted": table.index.isin(item.used.index)}


def _diagnostics(estimate: Fit, used: pd.DataFrame) -> dict[str, Any]:
    """Return by point: row, residual (law minus data), leverage, residual when left out; and how far parameters then
    move."""
    if estimate.problem.n > LEFT_OUT:
        raise InputError(
            f"--diagnostics: {estimate.problem.n} points, allowed: up to {LEFT_OUT} (each is left out in turn)"
        )
    values, residuals = leave_one_out(estimate)
    return {
        "row": [int(row) for row in used.index],
        "residual": estimate.residuals.tolist(),
        "leverage": leverage(estimate).tolist(),
        "left_out_residual": residuals.tolist(),
        "parameters_without_a_point": {name: [float(v.min()), float(v.max())] for name, v in values.items()},
    }


def text(result: Mapping[str, Any]) -> str:
    """Return a document as lines for a terminal."""
    lines = [
        f"{result['law']}: {result['formula']} (source: {result['source']})",
        f"n {result['n']}, objective {result['objective']:.7g} ({result['minimize']})",
    ]
    for name, value in result["parameters"].items():
        lines.append(f"  {name:8} {value:<12.6g} {interval_text(name, result):42} {result['meaning'][name]}".rstrip())
    lines.append(f"  intervals: {result['interval_kind']}")
    held = result["holdout"]
    if held["n"]:
        error = f"mean |relative error| {held['mean_abs_relative_error']:.4%}"
        if result["residuals"] == "linear":  # an outcome next to 0 has a meaningless relative error
            error = f"root mean square error {held['rms_error']:.4g}, {error}"
        lines.append(f"  held out ({held['n']} {held['rule']}): {error}")
    if "diagnostics" in result:
        lines += _diagnostics_text(result["diagnostics"])
    lines += [f"  warning: {line}" for line in result["warnings"]]
    for item in result.get("predictions", []):
        words = f"predicted {item['predicted']:.6g}"
        if not math.isnan(item["observed"]):
            words += f", observed {item['observed']:.6g}, error {item['relative_error']:+.4%}"
        lines.append(f"  row {item['row']}: {words}")
    return "\n".join(lines)


def interval_text(name: str, result: Mapping[str, Any]) -> str:
    """Return the interval of a parameter: two ends, one where the other is its bound, and whether it is identified.

    `result` has `intervals`, `identified` and `bounds` by name; a parameter without an interval is fixed.
    """
    if name not in result["intervals"]:
        return "fixed"
    (low, high), closed = result["intervals"][name], result["identified"][name]
    open_low, open_high = (a == b for a, b in zip((low, high), result["bounds"][name], strict=True))
    if open_low and open_high:
        return "not identified"
    if open_low or open_high:
        return f"{f'<= {high:.6g}' if open_low else f'>= {low:.6g}'} (one-sided) not identified"
    return f"[{low:.6g}, {high:.6g}]{'' if closed else ' not identified'}"


def _diagnostics_text(diagnostics: Mapping[str, Any]) -> list[str]:
    """Return the most influential points, and how far each parameter moves when one point is left out."""
    rows, leverage, residual = (diagnostics[name] for name in ("row", "leverage", "left_out_residual"))
    most, worst = int(np.argmax(leverage)), int(np.argmax(np.abs(residual)))
    parameters = diagnostics["parameters_without_a_point"].items()
    ranges = (f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in parameters)
    return [
        f"  largest leverage: {leverage[most]:.3g} (row {rows[most]}); "
        f"largest residual when left out: {residual[worst]:+.3g} (row {rows[worst]})",
        f"  without any one point: {', '.join(ranges)}",
    ]
