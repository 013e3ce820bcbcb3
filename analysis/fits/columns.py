"""From a table and column expressions to a law's inputs; every fault of the data is one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.errors import InputError
from analysis.fits.problem import Problem
from analysis.laws.law import Law


def expressions(text: str) -> dict[str, str]:
    """Return expressions by name from `N=..., D=...`; commas inside backticks, brackets and quotes do not split."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "`'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    parsed: dict[str, str] = {}
    for part in parts:
        name, equals, expression = part.partition("=")
        name, expression = unicodedata.normalize("NFKC", name.strip()), expression.strip()
        if not equals or not name.isidentifier() or not expression or expression.startswith("="):
            raise InputError(f"--columns: {part.strip()!r} is not NAME=EXPRESSION, as in N=`Model Size`")
        if name in parsed:
            raise InputError(f"--columns: {name} is given twice")
        parsed[name] = expression
    return parsed


def prepared(table: pd.DataFrame) -> pd.DataFrame:
    """Return a plain index, and numbers as floats: integers would overflow in products such as 6 N D."""
    return _as_floats(table.reset_index(drop=True))


def _as_floats(table: pd.DataFrame) -> pd.DataFrame:
    """Convert columns that hold only numbers, as text or not, to floats."""
    return pd.DataFrame({column: _floats(series) for column, series in table.items()}, index=table.index)


def _floats(series: pd.Series) -> pd.Series:
    if pd.api.types.is_bool_dtype(series):
        return series
    converted = pd.to_numeric(series, errors="coerce")
    return converted.astype(float) if converted.notna().equals(series.notna()) else series


def evaluate(table: pd.DataFrame, expression: str, option: str) -> pd.Series:
    """Return an expression over the table's columns, in the syntax of pandas.eval.

    Args:
        table: The table.
        expression: The expression.
        option: The option that holds it, for errors.

    Raises:
        InputError: The expression cannot be evaluated.
    """
    try:
        result = table.eval(expression, engine="python", local_dict={}, global_dict={})
    except pd.errors.UndefinedVariableError as error:
        missing = re.findall(r"name '([^']*)'", str(error))
        name = missing[0].removeprefix("BACKTICK_QUOTED_STRING_").replace("_", " ") if missing else expression
        raise InputError(
            f"{option}: unknown column {name!r}; columns are {', '.join(map(str, table.columns))}"
            f"{_hint(table, expression)}"
        ) from None
    except Exception as error:  # pandas.eval raises many kinds for what a user typed
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{option}: {expression!r} cannot be evaluated: {text}{_hint(table, expression)}") from None
    return result if isinstance(result, pd.Series) else pd.Series(result, index=table.index)


def _hint(table: pd.DataFrame, expression: str) -> str:
    """Return how to write the name of a column that is not a plain name."""
    odd = next((name for name in map(str, table.columns) if not name.isidentifier() and name in expression), None)
    return "" if odd is None else f"; a name such as {odd} stands between backticks"


def number(table: pd.DataFrame, expression: str, option: str) -> np.ndarray:
    """Return an expression's values as floats (n,), NaN where missing.

    Args:
        table: The table.
        expression: The expression.
        option: The option that holds it, for errors.

    Raises:
        InputError: A value is not a number.
    """
    series = evaluate(table, expression, option)
    if not pd.api.types.is_numeric_dtype(series):
        row, bad = next((item for item in series.items() if not _is_number(item[1])), (0, None))
        raise InputError(f"{option}: {expression}: {bad!r} is not a number (row {row})")
    return series.to_numpy(float, na_value=np.nan)


def groups(table: pd.DataFrame, expression: str | None, option: str) -> np.ndarray | None:
    """Return an expression's values as labels (n,); None without an expression.

    Args:
        table: The table.
        expression: The expression; None: no groups.
        option: The option that holds it, for errors.

    Raises:
        InputError: A value is missing.
    """
    if expression is None:
        return None
    series = evaluate(table, expression, option)
    if series.isna().any():
        raise InputError(f"{option}: {expression} is missing in {int(series.isna().sum())} of {len(series)} rows")
    return labels(series).to_numpy()


def labels(series: pd.Series) -> pd.Series:
    """Return values as text; whole numbers, which `prepared` has made floats, have no decimal point."""
    is_whole = pd.api.types.is_float_dtype(series) and bool((series.abs() < 2**53).all() and (series % 1 == 0).all())
    return (series.astype("int64") if is_whole else series).astype(str)


def chosen(table: pd.DataFrame, condition: str | None, option: str) -> pd.DataFrame:
    """Return the rows that satisfy a condition; columns that hold only numbers in these rows become floats.

    Args:
        table: The table.
        condition: The condition; None: all rows.
        option: The option that holds it, for errors.
    """
    if condition is None:
        return table
    mask = evaluate(table, condition, option)
    if mask.dtype != bool:
        raise InputError(f"{option}: {condition!r} gives {mask.dtype}, allowed: a condition, true or false by row")
    if not mask.any():
        raise InputError(f"{option}: no row satisfies {condition!r}")
    return _as_floats(table[mask])


def numbers(table: pd.DataFrame, columns: Mapping[str, str], drop_missing: bool) -> tuple[pd.DataFrame, list[int]]:
    """Return the named expressions as float columns, and which rows of the table they are.

    Rows with a missing or infinite value are dropped if requested; otherwise a missing value is an InputError.

    Args:
        table: The table.
        columns: Name -> expression.
        drop_missing: Whether to drop rows with a missing value.
    """
    values = {name: number(table, expression, f"--columns: {name}") for name, expression in columns.items()}
    frame = pd.DataFrame(values, index=table.index)
    missing = frame.isna()
    if drop_missing:
        frame = frame[np.isfinite(frame.to_numpy()).all(axis=1)]
    elif missing.to_numpy().any():
        name = str(missing.columns[missing.any()][0])
        raise InputError(
            f"--columns: {name} is missing (NaN) in {int(missing[name].sum())} of {len(frame)} rows; "
            "give them values, leave them out with --drop-missing, or select the rows to fit with --where"
        )
    return frame, [int(row) for row in frame.index]


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def problem(
    law: Law,
    frame: pd.DataFrame,
    delta: float = np.inf,
    weights: np.ndarray | None = None,
    fixed: Mapping[str, float] | None = None,
) -> Problem:
    """Return a law's problem on a frame of its inputs and output, checked.

    Args:
        law: The law.
        frame: One row per point, with a column for each input and the output.
        delta: Delta of Huber's loss; infinite: least squares.
        weights: Weights of the points, (n,); None: equal.
        fixed: Parameters that are held fixed.

    Raises:
        InputError: The law cannot be fitted to these points.
    """
    wanted = [*law.inputs, law.output]
    absent = [name for name in wanted if name not in frame.columns]
    if absent:
        raise InputError(
            f"--columns: law {law.name} needs {', '.join(wanted)}; missing: {', '.join(absent)} "
            f"({'; '.join(f'{name}: {law.inputs[name]}' for name in absent if name in law.inputs) or law.formula})"
        )
    if frame.empty:
        raise InputError(f"--columns: no rows are left to fit law {law.name} to")
    for name in wanted:
        _check(law, name, frame[name])
    if fixed:
        _check_fixed(law, fixed)
    elif len(frame) > 2:
        _check_together(law, frame)
    if weights is not None and (bad := ~(np.isfinite(weights) & (weights > 0))).any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"--weights: got {weights[row]:g} in row {frame.index[row]} ({int(bad.sum())} such rows), "
            "allowed: finite numbers above 0; leave rows out with --where"
        )
    inputs = {name: frame[name].to_numpy(float) for name in law.inputs}
    return Problem(law, inputs, frame[law.output].to_numpy(float), delta, weights, dict(fixed or {}))


def _check_fixed(law: Law, fixed: Mapping[str, float]) -> None:
    """Check that fixed parameters have allowed values and that at least one is left to fit."""
    bounds = {parameter.name: (parameter.low, parameter.high) for parameter in law.parameters}
    for name, value in fixed.items():
        if name not in bounds:
            raise InputError(f"--fix: got {name!r}, allowed for law {law.name}: {', '.join(law.names)}")
        low, high = bounds[name]
        if not (np.isfinite(value) and low <= value <= high):
            words = f"{low:g} to {high:g}" if np.isfinite(high) else "a finite number"
            words = f"at least {low:g}" if np.isfinite(low) and not np.isfinite(high) else words
            raise InputError(f"--fix: got {name}={value:g}, allowed: {words}")
    if len(fixed) == len(law.names):
        raise InputError(f"--fix: every parameter of law {law.name} is fixed, so nothing is left to fit")


def _check_together(law: Law, frame: pd.DataFrame) -> None:
    """Check that no input is a power of another: the law's terms in them would be the same."""
    needed = [name for name in law.inputs if name not in law.constant_allowed]
    logs = {name: np.log(frame[name].to_numpy(float)) for name in needed if (frame[name] > 0).all()}
    for first, second in combinations(logs, 2):
        if 1 - abs(np.corrcoef(logs[first], logs[second])[0, 1]) < 1e-9:
            raise InputError(
                f"--columns: {second} is a power of {first} in all rows; law {law.name} cannot separate their terms"
            )


def _check(law: Law, name: str, series: pd.Series) -> None:
    """Check that values are finite, of the allowed sign and not all equal (a constant cannot carry an exponent)."""
    values = series.to_numpy(float)
    if not np.isfinite(values).all():
        bad_rows = np.flatnonzero(~np.isfinite(values))
        raise InputError(
            f"--columns: {name} is {values[bad_rows[0]]:g} in row {series.index[bad_rows[0]]} ({len(bad_rows)} such "
            "rows); leave them out with --drop-missing or --where"
        )
    is_output = name == law.output
    positive = law.residuals == "log" if is_output else True
    if positive and name not in law.any_sign:
        bad = values < 0 if name in law.zero_allowed else values <= 0
        if bad.any():
            bound = "at least 0" if name in law.zero_allowed else "above 0"
            if is_output:
                bound += " for residuals of its logarithm (others: --residuals linear)"
            row = int(np.flatnonzero(bad)[0])
            raise InputError(
                f"--columns: {name} is {values[row]:g} in row {series.index[row]} ({int(bad.sum())} such rows); "
                f"law {law.name} needs it {bound}"
            )
    if len(values) == 1:
        raise InputError(f"--columns: a single point cannot fit law {law.name}")
    if np.ptp(values) <= 1e-12 * np.abs(values).max() and name not in law.constant_allowed:
        advice = "; leave D out of --columns to fit without its term" if name == "D" and law.dense else ""
        raise InputError(f"--columns: {name} is constant ({values[0]:g}); law {law.name} needs it to vary{advice}")
