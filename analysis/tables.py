"""Reading tables of runs from CSV, JSON lines or parquet, and writing frames and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import InputError

FORMATS = ".csv, .tsv, .jsonl, .json (an array of objects) or .parquet, all but parquet also with .gz"


def read_table(path: Path) -> pd.DataFrame:
    """The table in a file, by its suffix; InputError if it is absent, empty, of another kind or malformed."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        if suffix in (".csv", ".tsv"):
            table = pd.read_csv(path, sep="," if suffix == ".csv" else "\t")
        elif suffix in (".jsonl", ".json", ".ndjson"):
            table = pd.read_json(path, lines=suffix != ".json")
        elif suffix in (".parquet", ".pq"):
            table = pd.read_parquet(path)
        else:
            raise InputError(f"{path}: suffix is {suffix or 'missing'!r}, allowed: {FORMATS}")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as {suffix}: {str(error).splitlines()[0]}") from None
    if table.empty:
        raise InputError(f"{path}: no rows")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError if it is absent or is not one."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, allowed: a JSON object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of an append-only JSON-lines file.

    A last line without its newline was cut by a kill and is dropped; any other malformed line is an
    InputError.
    """
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
    return found


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left, the rest right."""
    rule = [":--" if column < left else "--:" for column in range(len(headers))]
    lines = [headers, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def number(value: object, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, thousands grouped, an en dash for what is missing."""
    if not isinstance(value, Real) or value != value:
        return "–"
    value = float(value)
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:#.{digits}g}".replace("-", "−")


def signed(value: object, digits: int = 3) -> str:
    """As `number`, with its sign written out."""
    text = number(value, digits)
    return f"+{text}" if isinstance(value, Real) and float(value) > 0 else text
