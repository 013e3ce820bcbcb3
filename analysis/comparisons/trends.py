"""A first fit of a grid's outcomes against table size and base size, log-linear in both.

    ln y = a + b ln(1 + M / N) + c ln N,   y = E50 or NLL, M table parameters, N non-embedding base parameters

Each variant of a memory family is fitted separately, whatever the size of its table: the forms of a family are not
sizes of one table. A term that the grid does not vary is not identified and is omitted. Intervals come from the spread
of runs within cells, that is, within one base and table size. The cell with the largest table is also predicted by a
fit to the others. Controls (`model.control`) are omitted: their tables cannot learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import paired_by_group
from analysis.records.grid_data import GridData
from analysis.records.runs.labels import TABLE_SIZES, labels_across_bases

OUTSIDE_A_VARIANT = ("train", *(f"model.{name}" for name in TABLE_SIZES))
"""Settings in which the runs of one fit may differ: the size of the table, and training, which is tuned for it."""
TERMS = ("constant", "ln(1 + M/N)", "ln N")


@dataclass(frozen=True)
class Trend:
    """A fit of one outcome of one variant of a memory family with the reference.

    `cells` counts the sizes of bases and tables. Intervals are NaN where runs do not repeat.
    """

    outcome: str
    family: str
    variant: str
    runs: int
    cells: int = 0
    left_out: str = ""
    estimates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    not_identified: tuple[str, ...] = ()
    held_out: dict[str, float | str] = field(default_factory=dict)
    points: tuple[tuple[str, str, float, float, float, float], ...] = ()
    """By cell: base, label, geometric mean of the outcome with its 95 % t-interval, and the fitted value."""


def trends(data: GridData) -> list[Trend]:
    """Return the fits that a grid allows, one per outcome and variant of a memory family, with the reference in the
    same worlds."""
    table = data.done[data.done["params_total"].notna() & (data.done["partner"] >= 0)]
    is_reference = table["family"].eq(data.reference) & ~table["reshaped"]
    table = table[(table["memory_rows"] > 0) & table["control"].isna() | is_reference]
    table = table.assign(variant=labels_across_bases(list(table["settings"]), OUTSIDE_A_VARIANT))
    fits = []
    for variant, runs in table[table["memory_rows"] > 0].groupby("variant", sort=False):
        reference = is_reference[table.index] & table["pairing"].isin(runs["pairing"])
        part = table[reference | table["variant"].eq(variant)]
        for outcome, values, left_out in _outcomes(data, part):
            positive = part.assign(y=values)
            positive = positive[positive["y"] > 0]
            if len(positive):
                named = Trend(outcome, str(runs["family"].iloc[0]), str(variant), len(positive), left_out=left_out)
                fits.append(_fitted(named, positive))
    return fits


def _outcomes(data: GridData, part: pd.DataFrame) -> list[tuple[str, np.ndarray, str]]:
    """Return each outcome as its name, its value per run, and a note on omitted runs.

    Outcomes are E50 and storage NLL at a common exposure, or final loss at equal tokens."""
    reached = part["e50_state"].eq("reached")
    if reached.any():
        without = int((~reached).sum())
        note = f"without {without} runs that have no E50, so the fit is biased towards faster runs" if without else ""
        exposure = data.common_exposure(part.index)
        nll = data.curves("storage_nll").at(exposure, part.index.to_numpy(int))
        return [
            ("E50, exposures", np.where(reached, part["e50"], np.nan), note),
            (f"storage NLL at {exposure:.3g} exposures, nats", nll, ""),
        ]
    if part["tokens"].max() / part["tokens"].min() <= 1.01:
        return [("final evaluation-mode loss, nats/token", part["eval_loss"].to_numpy(float), "")]
    return []


def _design(table: pd.DataFrame) -> np.ndarray:
    size, memory = table["N"].to_numpy(float), table["params_memory"].fillna(0).to_numpy(float)
    return np.stack([np.ones(len(table)), np.log1p(memory / size), np.log(size)], 1)


def _fitted(trend: Trend, table: pd.DataFrame) -> Trend:
    """Fit least squares over runs, with intervals from their spread within cells, and predict the largest table."""
    x, y = _design(table), np.log(table["y"].to_numpy(float))
    cells = table.groupby(["base", "label"]).ngroup().to_numpy()
    varied = _identified(x)
    unique = int(cells.max()) + 1
    not_identified = tuple(TERMS[i] for i in range(3) if i not in varied)
    if unique <= len(varied):
        return replace(trend, cells=unique, not_identified=TERMS)
    estimate = np.linalg.lstsq(x[:, varied], y, rcond=None)[0]
    ends = _interval(x[:, varied], y, cells)
    rows = np.stack([estimate, *ends], 1).tolist()
    estimates = {TERMS[at]: (row[0], row[1], row[2]) for at, row in zip(varied, rows, strict=True)}
    fitted = np.bincount(cells, x[:, varied] @ estimate) / np.bincount(cells)
    observed = paired_by_group(y, cells, unique)
    first = table.assign(cell=cells).drop_duplicates("cell").sort_values("cell")
    points = tuple(
        (str(base), str(label), *np.exp([seen.mean, seen.low, seen.high, value]).tolist())
        for base, label, seen, value in zip(first["base"], first["label"], observed, fitted, strict=True)
    )
    return replace(
        trend,
        cells=unique,
        estimates=estimates,
        not_identified=not_identified,
        held_out=_held_out(table, x, y, cells),
        points=points,
    )


def _identified(x: np.ndarray) -> list[int]:
    """Return the columns that add a direction to those before them."""
    columns: list[int] = []
    for column in (0, 1, 2):
        if np.linalg.matrix_rank(x[:, [*columns, column]], tol=1e-8) > len(columns):
            columns.append(column)
    return columns


def _interval(x: np.ndarray, y: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % t-interval of each coefficient from the spread of runs within cells.

    Degrees of freedom are Satterthwaite's. A bootstrap of runs within cells tends to the same interval, but is too
    narrow for cells of a few runs.
    """
    from scipy.special import stdtrit

    members = [np.flatnonzero(cells == cell) for cell in np.unique(cells)]
    if min(map(len, members)) < 2:
        missing = np.full(x.shape[1], np.nan)
        return missing, missing
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
    """Return the cell with the most table parameters (the larger base on a tie), predicted by a fit to the others."""
    biggest = table.assign(cell=cells).sort_values(["params_memory", "N"])["cell"].iloc[-1]
    rest, out = cells != biggest, cells == biggest
    if len(set(cells[rest])) < 3:
        return {}
    columns = _identified(x[rest])
    if len(columns) < len(_identified(x)):
        return {}
    estimate = np.linalg.lstsq(x[rest][:, columns], y[rest], rcond=None)[0]
    predicted, seen = float(np.exp((x[out][:, columns] @ estimate).mean())), float(np.exp(y[out].mean()))
    first = table[out].iloc[0]
    return {
        "cell": f"{first['base']} {first['label']}",
        "predicted": predicted,
        "observed": seen,
        "relative_error": predicted / seen - 1,
    }
