"""The `fit --law` verb: a table and column expressions in, one document out."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.columns import chosen, evaluate, expressions, groups, number, numbers, prepared, problem
from analysis.fits.fit import AGREED, Fit, Problem, fit
from analysis.fits.intervals import (
    Bootstrap,
    HeldOut,
    bootstrap,
    hold_out,
    identified,
    leave_one_out,
    leverage,
    profile,
    standard_errors,
)
from analysis.fits.laws import LAWS, Law, law
from analysis.records.tables import read_table, write_table

LEFT_OUT = 3000
FEW_DRAWS = 100


@dataclass(frozen=True)
class Request:
    """What to fit to what, and what to say about it; the fields are the options of `python -m analysis fit`."""

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


def add_options(verb: argparse.ArgumentParser) -> None:
    """The options of a fit to a file."""
    verb.add_argument("--law", help=f"joint, {', '.join(LAWS)}")
    verb.add_argument("--data", type=Path, help="CSV, JSON lines or parquet of runs")
    verb.add_argument("--columns", help="NAME=EXPRESSION,... as pandas.eval reads them")
    verb.add_argument("--huber", type=float, metavar="DELTA", help="Huber's loss on log residuals; else least squares")
    verb.add_argument("--minimize", choices=("sum", "mean"), default="sum", help="objective over points")
    verb.add_argument("--residuals", choices=("log", "linear"), help="scale of residuals; default: the law's")
    verb.add_argument("--where", help="fit to rows that satisfy this condition")
    verb.add_argument("--predict", help="predict rows that satisfy this condition, with relative errors")
    verb.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave out the K highest outputs")
    verb.add_argument("--drop-missing", action="store_true", help="leave out rows with missing values")
    verb.add_argument("--weights", metavar="EXPR", help="weight of each point")
    verb.add_argument("--cluster", metavar="EXPR", help="resample, and hold out, whole groups (runs)")
    verb.add_argument("--strata", metavar="EXPR", help="resample within these groups (cells)")
    verb.add_argument("--bootstrap", type=int, default=0, metavar="DRAWS")
    verb.add_argument(
        "--holdout", type=float, default=0.1, metavar="SHARE", help="largest cells held out first; 0: none"
    )
    verb.add_argument("--holdout-by", metavar="EXPR", help="what is large, or a condition: just those rows")
    verb.add_argument("--fix", action="append", default=[], metavar="NAME=VALUE", help="hold a parameter fixed")
    verb.add_argument(
        "--group", metavar="EXPR", help="isoflop: the compute budget; one parabola each, then the frontier"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--diagnostics", action="store_true", help="residuals, leverage and leave-one-out by point")
    verb.add_argument("--figure", type=Path, metavar="FOLDER", help="draw the fit there: PNG, PDF, SVG")


def request(options: argparse.Namespace) -> Request:
    """The request of parsed options, checked."""
    for name in ("law", "data", "columns"):
        if getattr(options, name) is None:
            raise InputError(f"--{name}: missing; a fit to a file needs --law, --data and --columns")
    fixed = {}
    for item in options.fix:
        name, _, value = (part.strip() for part in item.partition("="))
        if name in fixed:
            raise InputError(f"--fix: {name} is given twice")
        try:
            fixed[name] = float(value)
        except ValueError:
            raise InputError(f"--fix: got {item!r}, allowed: NAME=NUMBER") from None
    fields = {name: getattr(options, name) for name in Request.__dataclass_fields__ if name not in ("fix", "source")}
    return Request(**fields, fix=fixed, source=options.data.name)


def _checked(asked: Request) -> None:
    if asked.huber is not None and not asked.huber > 0:
        raise InputError(f"--huber: got {asked.huber:g}, allowed: above 0")
    if not 0 <= asked.holdout < 1:
        raise InputError(f"--holdout: got {asked.holdout:g}, allowed: 0 to below 1")
    for name in ("bootstrap", "drop_highest", "seed"):
        if getattr(asked, name) < 0:
            raise InputError(f"--{name.replace('_', '-')}: got {getattr(asked, name)}, allowed: 0 or more")
    for name in ("cluster", "strata"):
        if getattr(asked, name) is not None and not asked.bootstrap:
            raise InputError(f"--{name}: says how the bootstrap resamples, and needs --bootstrap DRAWS")


def run(table: pd.DataFrame, asked: Request) -> dict[str, Any]:
    """Fit, and say how far it can be trusted: the document `fit --json` prints."""
    _checked(asked)
    given, table = table.reset_index(drop=True), prepared(table)
    columns = expressions(asked.columns)
    rows = chosen(table, asked.where, "--where")
    result = _documents(rows, table, columns, asked)
    if asked.out is not None:
        write_table(given.assign(**_predicted(result, rows, table, columns, asked)), asked.out)
    return result


def _documents(rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], asked: Request) -> dict[str, Any]:
    """One law's document; of isoFLOP groups all parabolas, of the joint laws the selected one among all."""
    if asked.group is not None:
        if asked.law != "isoflop":
            raise InputError(f"--group: got law {asked.law!r}, allowed: isoflop")
        from analysis.fits.isoflop import isoflop_document

        return isoflop_document(rows, columns, asked)
    if asked.law == "joint":
        from analysis.fits.joint import select_joint

        return select_joint(rows, table, columns, asked)
    return document(chosen_law(asked.law, columns, asked), rows, table, columns, asked)


def chosen_law(name: str, columns: Mapping[str, str], asked: Request) -> Law:
    """The law, with the scale of residuals asked for: Huber's loss is on logarithms unless said otherwise."""
    found = law(name, set(columns))
    unknown = sorted(set(columns) - {*found.inputs, found.output})
    if unknown:
        raise InputError(
            f"--columns: got {unknown[0]!r}, allowed for law {name}: {', '.join([*found.inputs, found.output])}"
        )
    scale = asked.residuals or ("log" if asked.huber is not None else found.residuals)
    return replace(found, residuals=scale)  # type: ignore[arg-type]


def data(entry: Law, rows: pd.DataFrame, columns: Mapping[str, str], asked: Request) -> tuple[Problem, pd.DataFrame]:
    """The problem and the rows it uses, after dropping what was asked to be dropped."""
    wanted = {name: columns[name] for name in [*entry.inputs, entry.output] if name in columns}
    frame, _ = numbers(rows, wanted, asked.drop_missing)
    if asked.drop_highest and entry.output in frame:
        frame = frame.sort_values(entry.output, kind="stable").iloc[: max(0, len(frame) - asked.drop_highest)]
        frame = frame.sort_index()
    used = rows.loc[frame.index]
    weights = None
    if asked.weights is not None:
        weights = number(used, asked.weights, "--weights")
    delta = math.inf if asked.huber is None else asked.huber
    return problem(entry, frame, delta, weights, asked.fix), used


def document(
    entry: Law, rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], asked: Request
) -> dict[str, Any]:
    """Everything about one law on one set of rows."""
    posed, used = data(entry, rows, columns, asked)
    held = held_out(posed, used, asked)
    found = fit(posed, asked.seed)
    profiles = profile(found)
    known = identified(found, profiles)
    draws = _bootstrap(found, used, asked)
    divisor = posed.n if asked.minimize == "mean" else 1
    result: dict[str, Any] = {
        "law": entry.name,
        "formula": entry.formula,
        "source": entry.source,
        "n": posed.n,
        "parameters": found.parameters,
        "meaning": {p.name: p.meaning for p in entry.parameters},
        "objective": found.objective / divisor,
        "minimize": asked.minimize,
        "residuals": entry.residuals,
        "huber": asked.huber,
        "seed": asked.seed,
        "intervals": {p.name: list(draws.interval(p.name) if draws else profiles[p.name]) for p in posed.free},
        "interval_kind": f"95 %, from {draws.kept} bootstrap refits" if draws else "95 % profile",
        "profile": {name: list(ends) for name, ends in profiles.items()},
        "standard_errors": {n: draws.standard_error(n) for n in profiles} if draws else standard_errors(found),
        "identified": known,
        "holdout": _held_json(held, entry),
        "fixed": dict(posed.fixed),
        "warnings": _warnings(found, known, draws, held),
    }
    if asked.predict is not None:
        result["predictions"] = _predictions(found, entry, chosen(table, asked.predict, "--predict"), columns)
    if asked.diagnostics:
        result["diagnostics"] = _diagnostics(found, used)
    if asked.figure is not None:
        from analysis.figures.law import law_figure

        paths = law_figure(found, held, asked.figure, f"Source: {asked.source}." if asked.source else "")
        result["figure"] = [str(path) for path in paths]
    return result


def held_out(posed: Problem, used: pd.DataFrame, asked: Request) -> HeldOut:
    """The largest cells predicted before the fit to all; nothing if the share is 0."""
    nothing = np.array([])
    if asked.holdout == 0:
        return HeldOut("", nothing, nothing, nothing, "--holdout 0")
    share = asked.holdout
    if asked.holdout_by is None:
        size, rule = posed.law.size(posed.x), f"largest by the size of law {posed.law.name}"
    elif evaluate(used, asked.holdout_by, "--holdout-by").dtype == bool:
        declared = chosen(used, asked.holdout_by, "--holdout-by").index
        size, rule, share = used.index.isin(declared).astype(float), f"where {asked.holdout_by}", 1 / len(used)
    else:
        size, rule = number(used, asked.holdout_by, "--holdout-by"), f"largest {asked.holdout_by}"
        if not np.isfinite(size).all():
            raise InputError(f"--holdout-by: {asked.holdout_by} is missing or infinite in some rows")
    clusters = groups(used, asked.cluster, "--cluster")
    if clusters is not None:  # a run whose other checkpoints are fitted to is not held out
        size, rule = pd.Series(size).groupby(clusters).transform("max").to_numpy(), f"{rule}, whole {asked.cluster}"
    return hold_out(posed, size, share, rule, asked.seed)


def _bootstrap(found: Fit, used: pd.DataFrame, asked: Request) -> Bootstrap | None:
    if not asked.bootstrap:
        return None
    clusters, strata = groups(used, asked.cluster, "--cluster"), groups(used, asked.strata, "--strata")
    _check_resampling(found, clusters, strata)
    return bootstrap(found, asked.bootstrap, asked.seed, clusters, strata)


def _check_resampling(found: Fit, clusters: np.ndarray | None, strata: np.ndarray | None) -> None:
    """More runs than parameters, each in one stratum, and strata in which there is something to draw."""
    units = np.arange(found.problem.n) if clusters is None else clusters
    free, known = len(found.problem.free), len(np.unique(units))
    if known <= free:
        raise InputError(f"--cluster: {known} groups are too few to resample for {free} parameters")
    if strata is None:
        return
    pairs = pd.DataFrame({"unit": units, "stratum": strata}).drop_duplicates()
    if pairs["unit"].duplicated().any():
        name = pairs["unit"][pairs["unit"].duplicated()].iloc[0]
        raise InputError(f"--strata: group {name!r} of --cluster lies in more than one stratum")
    if (pairs["stratum"].value_counts() == 1).all():
        raise InputError("--strata: every stratum holds a single run, so there is nothing to resample")


def _held_json(held: HeldOut, entry: Law) -> dict[str, Any]:
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


def _warnings(found: Fit, known: Mapping[str, bool], draws: Bootstrap | None, held: HeldOut) -> list[str]:
    """What a reader must know before using the numbers."""
    lines = [f"{name}: not identified (its 95 % profile is open)" for name, closed in known.items() if not closed]
    n, free = found.problem.n, len(found.problem.free)
    if found.problem.different == free:
        lines.append(f"as many different points as parameters ({free}): nothing tests the law's form")
    if n < 2 * free:
        lines.append(f"{n} points for {free} parameters: intervals are wide or open, and a bootstrap says little")
    if draws is not None and draws.asked < FEW_DRAWS:
        lines.append(f"{draws.asked} bootstrap draws are too few for the ends of a 95 % interval; 1000 are usual")
    if draws is not None and draws.kept < draws.asked:
        lines.append(f"{draws.asked - draws.kept} of {draws.asked} bootstrap draws had too few distinct points")
    if found.agreeing < min(AGREED, len(found.bank)):
        lines.append(f"only {found.agreeing} of {len(found.bank)} starts reached the optimum: try other seeds")
    if not len(held.rows):
        lines.append(f"nothing held out: {held.reason}")
    return lines


def _predictions(found: Fit, entry: Law, rows: pd.DataFrame, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    frame, index = numbers(rows, {name: columns[name] for name in [*entry.inputs, entry.output]}, drop_missing=False)
    predicted = found.predict({name: frame[name].to_numpy(float) for name in entry.inputs})
    observed = frame[entry.output].to_numpy(float)
    return [
        {"row": row, "predicted": float(p), "observed": float(o), "relative_error": float(p / o - 1)}
        for row, p, o in zip(index, predicted, observed, strict=True)
    ]


def _predicted(
    result: Mapping[str, Any], rows: pd.DataFrame, table: pd.DataFrame, columns: Mapping[str, str], asked: Request
) -> dict[str, np.ndarray]:
    """By row of the whole table: `predicted` by the law, missing where an input is, and whether it was `fitted`."""
    entry = chosen_law(result["law"], columns, asked)
    _, used = data(entry, rows, columns, asked)
    inputs = {name: number(table, columns[name], f"--columns: {name}") for name in entry.inputs}
    with np.errstate(all="ignore"):
        predicted = np.broadcast_to(entry.value(result["parameters"], inputs), len(table))
    known = np.isfinite(np.stack(list(inputs.values()))).all(0)
    return {"predicted": np.where(known, predicted, np.nan), "fitted": table.index.isin(used.index)}


def _diagnostics(found: Fit, used: pd.DataFrame) -> dict[str, Any]:
    """By point: row, residual (law minus data), leverage, residual when left out; and how far parameters then move."""
    if found.problem.n > LEFT_OUT:
        raise InputError(
            f"--diagnostics: {found.problem.n} points, allowed: up to {LEFT_OUT} (each is left out in turn)"
        )
    values, residuals = leave_one_out(found)
    return {
        "row": [int(row) for row in used.index],
        "residual": found.residuals.tolist(),
        "leverage": leverage(found).tolist(),
        "left_out_residual": residuals.tolist(),
        "parameters_without_a_point": {name: [float(v.min()), float(v.max())] for name, v in values.items()},
    }


def text(result: Mapping[str, Any]) -> str:
    """A document as lines for a terminal."""
    lines = [
        f"{result['law']}: {result['formula']} (source: {result['source']})",
        f"n {result['n']}, objective {result['objective']:.7g} ({result['minimize']})",
    ]
    for name, value in result["parameters"].items():
        low, high = result["intervals"].get(name, (value, value))
        known = result["identified"].get(name)
        note = " fixed" if known is None else "" if known else " not identified"
        lines.append(f"  {name:8} {value:<12.6g} {f'[{low:.6g}, {high:.6g}]{note}':36} {result['meaning'][name]}")
    lines.append(f"  intervals: {result['interval_kind']}")
    held = result["holdout"]
    if held["n"]:
        lines.append(
            f"  held out ({held['n']} {held['rule']}): mean |relative error| {held['mean_abs_relative_error']:.4%}"
        )
    if "diagnostics" in result:
        lines += _diagnostics_text(result["diagnostics"])
    lines += [f"  warning: {line}" for line in result["warnings"]]
    for item in result.get("predictions", []):
        words = f"predicted {item['predicted']:.6g}, observed {item['observed']:.6g}"
        lines.append(f"  row {item['row']}: {words}, error {item['relative_error']:+.4%}")
    return "\n".join(lines)


def _diagnostics_text(found: Mapping[str, Any]) -> list[str]:
    """The points that say most, and how far each parameter moves when one point is left out."""
    most, worst = int(np.argmax(found["leverage"])), int(np.argmax(np.abs(found["left_out_residual"])))
    ranges = (f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in found["parameters_without_a_point"].items())
    return [
        f"  largest leverage: {found['leverage'][most]:.3g} (row {found['row'][most]}); "
        f"largest residual when left out: {found['left_out_residual'][worst]:+.3g} (row {found['row'][worst]})",
        f"  without any one point: {', '.join(ranges)}",
    ]


def main(options: argparse.Namespace, finite: Any) -> int:
    """`fit --law`: read the file, fit, print."""
    asked = request(options)
    result = run(read_table(options.data), asked)
    if options.json:
        print(json.dumps(finite(result)))
    else:
        candidates = result.get("candidates") or [result]
        if "groups" in result:
            from analysis.fits.isoflop import isoflop_text

            print(isoflop_text(result))
            candidates = [result["frontier"]] if "parameters" in result["frontier"] else []
        if candidates:
            print("\n".join(text(item) for item in candidates))
        if "selected" in result:
            print("\n".join(f"left out: {name}: {reason}" for name, reason in result["refused"].items()))
            print(f"selected: {result['selected']} ({result['rule']})")
    return 0
