"""One law in several groups of runs: separate fits, shared parameters, and a test whether they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.columns import chosen, expressions, groups, prepared
from analysis.fits.fit import Fit, fit, settle
from analysis.fits.intervals import noise_scale
from analysis.fits.problem import Problem
from analysis.fits.profile import identified, profiled
from analysis.fits.solver import minimise
from analysis.laws.law import Law
from analysis.studies.document import interval_text
from analysis.studies.request import Request, check, chosen_law, data

GROUP = "group"


def fit_groups(table: pd.DataFrame, request: Request, by: str, shared: Sequence[str]) -> dict[str, Any]:
    """Fit a law in each group, and once more with some parameters shared.

    Args:
        table: The runs.
        request: The fit.
        by: Expression of the group.
        shared: Names of the parameters that all groups share.

    Returns:
        The document: `groups`, each with parameters and 95 % profile intervals; with shared parameters also `shared`,
        the fit in which they are equal, and `test`, an F test of that fit against separate ones.
    """
    check(request)
    columns = expressions(request.columns)
    rows = chosen(prepared(table), request.where, "--where")
    law = chosen_law(request.law, columns, request)
    unknown = [name for name in shared if name not in law.names]
    if unknown:
        raise InputError(f"--shared: got {unknown[0]!r}, allowed for law {law.name}: {', '.join(law.names)}")
    posed, used = data(law, rows, columns, request)
    labels = groups(used, by, "--by")
    assert labels is not None
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise InputError(f"--by: {by} is {names[0]!r} in every row, so there is one group")
    fits = []
    for name in names:
        try:
            fits.append(profiled(fit(posed.restricted(labels == name), request.seed)))
        except InputError as error:
            raise InputError(f"--by: group {name}: {error}; leave it out with --where") from None
    document: dict[str, Any] = {
        "law": law.name,
        "formula": law.formula,
        "by": by,
        "n": posed.n,
        "groups": [
            {"group": name, "n": estimate.problem.n, **_reported(estimate, ends)}
            for name, (estimate, ends) in zip(names, fits, strict=True)
        ],
    }
    if shared:
        document |= _shared(posed, labels, names, [estimate for estimate, _ in fits], shared)
    return document


def _reported(estimate: Fit, ends: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    return {
        "objective": estimate.objective,
        "parameters": estimate.parameters,
        "intervals": {name: list(pair) for name, pair in ends.items()},
        "identified": identified(estimate.problem, dict(ends)),
        "at_bound": estimate.at_bound,
        "bounds": {p.name: [p.low, p.high] for p in estimate.problem.free},
    }


def _shared(
    posed: Problem, labels: np.ndarray, names: list[str], separate: list[Fit], shared: Sequence[str]
) -> dict[str, Any]:
    """Return the fit with shared parameters, and the F test of it."""
    from scipy.special import fdtrc

    law = grouped(posed.law, names, shared)
    x = {**posed.x, GROUP: np.array([names.index(label) for label in labels], float)}
    fixed = {key: value for key, value in posed.fixed.items() if key in shared}
    fixed |= {f"{key}[{name}]": v for key, v in posed.fixed.items() if key not in shared for name in names}
    problem = replace(posed, law=law, x=x, fixed=fixed)
    estimate = _joint_fit(problem, separate, names, shared)
    estimate, ends = profiled(estimate)
    full = sum(item.objective for item in separate)
    free = [name for name in shared if name not in posed.fixed]
    first = len(free) * (len(names) - 1)
    second = posed.n - sum(item.dimension for item in separate)
    result: dict[str, Any] = {"shared": {"names": list(shared), **_reported(estimate, ends)}}
    if second < 1 or not first:
        return result | {"test": {"reason": "no degrees of freedom are left"}}
    noise = sum(noise_scale(item) * item.problem.n for item in separate) / posed.n
    f = 2 * max(estimate.objective - full, 0.0) / first / noise if noise > 0 else np.inf
    p = float(fdtrc(first, second, f))
    return result | {"test": {"F": float(f), "degrees": [first, second], "p": p}}


def _joint_fit(problem: Problem, separate: list[Fit], names: list[str], shared: Sequence[str]) -> Fit:
    """Fit all groups together, from the separate optima: shared parameters start at each group's in turn and at their
    mean."""
    tables = [dict(zip([p.name for p in item.problem.free], item.theta, strict=True)) for item in separate]
    starts = []
    for pick in [*range(len(separate)), None]:
        theta = []
        for parameter in problem.free:
            base, _, group = parameter.name.partition("[")
            if group:
                theta.append(tables[names.index(group[:-1])][base])
            else:
                theta.append(np.mean([t[base] for t in tables]) if pick is None else tables[pick][base])
        starts.append(theta)
    weights = np.broadcast_to(problem.w, (len(starts), problem.n))
    bank, value = minimise(problem.residual, np.array(starts), weights, problem.delta, problem.box, iterations=400)
    best = int(np.argmin(value))
    optimum, reached = settle(problem, bank[best], float(value[best]))
    same = int((value <= value[best] * (1 + 1e-6) + problem.negligible).sum())
    return Fit(problem, optimum, reached, np.concatenate([optimum[None], bank]), same)


def grouped(law: Law, names: Sequence[str], shared: Sequence[str]) -> Law:
    """Return the law with one value of each parameter that is not shared per group; the input `group` numbers the
    groups.

    Args:
        law: The law.
        names: Names of the groups.
        shared: Names of the parameters that all groups share.
    """

    def value(values: Mapping[str, Any], x: Mapping[str, np.ndarray]) -> Any:
        inner = {name: item for name, item in values.items() if "[" not in name}
        for parameter in law.parameters:
            if parameter.name not in shared:
                inner[parameter.name] = sum(
                    values[f"{parameter.name}[{name}]"] * (x[GROUP] == i) for i, name in enumerate(names)
                )
        return law.value(inner, {name: item for name, item in x.items() if name != GROUP})

    parameters = [p for p in law.parameters if p.name in shared]
    parameters += [
        replace(p, name=f"{p.name}[{name}]") for name in names for p in law.parameters if p.name not in shared
    ]
    return replace(
        law,
        inputs={**law.inputs, GROUP: "number of the group"},
        parameters=tuple(parameters),
        value=value,
        starts=lambda x: _starts(law, x, names),
        units=lambda values, x: {},
        scales=frozenset(f"{name}[{group}]" for name in law.scales for group in names) | law.scales,
    )


def _starts(law: Law, x: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    ranges = law.starts({name: values for name, values in x.items() if name != GROUP})
    return ranges | {f"{key}[{name}]": pair for key, pair in ranges.items() for name in names}


def text(document: Mapping[str, Any]) -> str:
    """Return fits by group as lines for a terminal."""
    lines = [f"{document['law']}: {document['formula']}; n {document['n']}, {len(document['groups'])} groups"]
    for item in document["groups"]:
        lines.append(f"  {document['by']} = {item['group']} (n {item['n']})")
        lines += [f"    {line}" for line in _lines(item)]
    if "shared" in document:
        lines.append(f"  shared: {', '.join(document['shared']['names'])}")
        lines += [f"    {line}" for line in _lines(document["shared"])]
        test = document["test"]
        first, second = test.get("degrees", (0, 0))
        verdict = test.get("reason") or f"F({first}, {second}) = {test['F']:.4g}, p = {test['p']:.3g}"
        lines.append(f"  test that they are equal in all groups: {verdict}")
    return "\n".join(lines)


def _lines(item: Mapping[str, Any]) -> list[str]:
    return [f"{name:12} {value:<12.6g} {interval_text(name, item)}" for name, value in item["parameters"].items()]
