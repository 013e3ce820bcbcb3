"""A first, honest fit of one grid's outcomes against table size and base size: log-linear, by cells of runs.

    ln y = a + b ln(1 + M / N) + c ln N,   y = E50 or NLL, M table parameters, N non-embedding base parameters

A term the grid does not vary is not identified and left out. Intervals: the spread of runs within cells. The
cell with the largest table is predicted from the others before the fit that is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.comparisons.paired import bits_at, final_scores, paired
from analysis.records.runs import Run, partners, summary

TERMS = ("constant", "ln(1 + M/N)", "ln N")


@dataclass(frozen=True)
class Trend:
    """A fit of one outcome of one memory family with dense; intervals are (nan, nan) where runs do not repeat."""

    outcome: str
    family: str
    runs: int
    cells: int
    left_out: str
    estimates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    not_identified: tuple[str, ...] = ()
    held_out: dict[str, float | str] = field(default_factory=dict)
    points: tuple[tuple[str, str, float, float, float, float], ...] = ()
    """By cell: base, label, geometric mean of the outcome with its 95 % t-interval (NaN for few runs), and fitted."""


def trends(runs: list[Run]) -> list[Trend]:
    """The fits a grid allows, one per memory family and outcome."""
    table = summary(runs)
    table = table[(table["state"] == "done") & table["params_total"].notna()].copy()
    partner = partners(runs)
    bare = {name: dense.account for name, dense in partner.items()}
    table = table[table["run"].isin(list(bare))]
    table["N"] = [bare[name]["params_total"] - bare[name].get("params_embedding", 0) for name in table["run"]]
    table = table[(table["memory_rows"] > 0) | (table["family"].eq("dense") & ~table["reshaped"])]
    by_name = {run.name: run for run in runs}
    found = []
    for family in table.loc[table["memory_rows"] > 0, "family"].unique():
        part = table[table["family"].isin([family, "dense"])]
        for outcome, values, left_out in _outcomes(part, by_name):
            known = part.assign(y=values)
            known = known[known["y"] > 0]
            if len(known):
                found.append(_fit(outcome, str(family), known, left_out))
    return found


def _outcomes(part: pd.DataFrame, runs: dict[str, Run]) -> list[tuple[str, np.ndarray, str]]:
    """(name, value per run, what was left out): E50, storage NLL at a common exposure, or final loss at
    equal tokens."""
    found = []
    reached = part["e50_state"].eq("reached")
    if reached.any():
        censored = int((~reached).sum())
        note = f"{censored} runs without a measured E50 left out: the fit is biased to faster runs" if censored else ""
        found.append(("E50, exposures", np.where(reached, part["e50"], np.nan), note))
        exposure = min(float(runs[name].probes["epoch"].iloc[-1]) for name in part["run"])
        nll = np.array([bits_at(runs[name], exposure, "storage_nll") for name in part["run"]])
        found.append((f"storage NLL at {exposure:.3g} exposures, nats", nll, ""))
    elif part["tokens"].max() / part["tokens"].min() <= 1.01:
        loss = np.array([final_scores(runs[name]).get("eval/nll", np.nan) for name in part["run"]])
        found.append(("final evaluation-mode loss, nats/token", loss, ""))
    return found


def _design(table: pd.DataFrame) -> np.ndarray:
    size, memory = table["N"].to_numpy(float), table["params_memory"].fillna(0).to_numpy(float)
    return np.stack([np.ones(len(table)), np.log1p(memory / size), np.log(size)], 1)


def _fit(outcome: str, family: str, table: pd.DataFrame, left_out: str) -> Trend:
    """Least squares over runs, intervals from their spread within cells, the largest table predicted beforehand."""
    x, y = _design(table), np.log(table["y"].to_numpy(float))
    cells = table.groupby(["base", "label"]).ngroup().to_numpy()
    kept = _identified(x)
    unique = len(set(cells))
    names = [TERMS[i] for i in kept]
    open_terms = tuple(TERMS[i] for i in range(3) if i not in kept)
    if unique <= len(kept):
        return Trend(outcome, family, len(y), unique, left_out, not_identified=TERMS)
    estimate = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    low, high = _interval(x[:, kept], y, cells)
    found = {name: (float(e), float(a), float(b)) for name, e, a, b in zip(names, estimate, low, high, strict=True)}
    fitted = x[:, kept] @ estimate
    points = tuple(
        (
            str(first["base"]),
            str(first["label"]),
            *np.exp([seen.mean, seen.low, seen.high, fitted[rows].mean()]).tolist(),
        )
        for rows in (cells == cell for cell in np.unique(cells))
        for first, seen in ((table[rows].iloc[0], paired(y[rows])),)
    )
    return Trend(outcome, family, len(y), unique, left_out, found, open_terms, _held_out(table, x, y, cells), points)


def _identified(x: np.ndarray) -> list[int]:
    """Columns that add a direction to those before them."""
    kept: list[int] = []
    for column in (0, 1, 2):
        if np.linalg.matrix_rank(x[:, [*kept, column]], tol=1e-8) > len(kept):
            kept.append(column)
    return kept


def _interval(x: np.ndarray, y: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % t-interval of each coefficient from the spread of runs within cells, Satterthwaite's degrees of freedom.

    It is what resampling runs within cells tends to, without that bootstrap's shrinkage in cells of a few runs.
    """
    from scipy.special import stdtrit

    members = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    if min(map(len, members)) < 2:
        nothing = np.full(x.shape[1], np.nan)
        return nothing, nothing
    influence = np.linalg.pinv(x)
    estimate = influence @ y
    parts = np.array([influence[:, rows].sum(1) ** 2 * y[rows].var(ddof=1) / len(rows) for rows in members])
    free = np.array([len(rows) - 1 for rows in members])[:, None]
    variance = parts.sum(0)
    with np.errstate(invalid="ignore"):
        degrees = np.nan_to_num(variance**2 / (parts**2 / free).sum(0), nan=1.0)
    reach = stdtrit(degrees, 0.975) * np.sqrt(variance)
    return estimate - reach, estimate + reach


def _held_out(table: pd.DataFrame, x: np.ndarray, y: np.ndarray, cells: np.ndarray) -> dict[str, float | str]:
    """The cell with the most table parameters (the larger base on a tie), predicted by a fit to the others."""
    biggest = table.assign(cell=cells).sort_values(["params_memory", "N"])["cell"].iloc[-1]
    rest, out = cells != biggest, cells == biggest
    if len(set(cells[rest])) < 3:
        return {}
    kept = _identified(x[rest])
    if len(kept) < len(_identified(x)):
        return {}
    estimate = np.linalg.lstsq(x[rest][:, kept], y[rest], rcond=None)[0]
    predicted, seen = float(np.exp((x[out][:, kept] @ estimate).mean())), float(np.exp(y[out].mean()))
    first = table[out].iloc[0]
    return {
        "cell": f"{first['base']} {first['label']}",
        "predicted": predicted,
        "observed": seen,
        "relative_error": predicted / seen - 1,
    }
