"""Reading tables of runs from CSV, JSON lines or parquet, and writing frames and Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pandas as pd

from analysis.errors import InputError

FORMATS = ".csv, .tsv, .jsonl, .json or .parquet, all but parquet also with .gz, .bz2, .xz or .zip"
CSV_ROWS = 100_000
"""Rows that are turned into text at once."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")


def read_table(path: Path) -> pd.DataFrame:
    """Return the table in a file, by its suffix; InputError if it is absent, empty, of another kind or malformed.

    A .csv may be separated by commas, semicolons, tabs or bars; a .json may hold an array of objects, or one a line.
    Named indexes of parquet are columns.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, allowed: a file' if path.is_dir() else 'no such file'}")
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    try:
        if suffix in (".csv", ".tsv"):
            table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else _separator(path))
        elif suffix in (".jsonl", ".json", ".ndjson"):
            table = _read_json_table(path, suffix)
        elif path.suffix in (".parquet", ".pq"):
            table = pd.read_parquet(path)
            table = table.reset_index([name for name in table.index.names if name is not None])
        else:
            raise InputError(f"{path}: suffix is {suffix or 'missing'!r}, allowed: {FORMATS}")
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise InputError(f"{path}: not readable as {suffix}: {str(error).splitlines()[0]}") from None
    if table.empty:
        raise InputError(f"{path}: no rows")
    return table


def _separator(path: Path) -> str:
    """Return of the usual separators the one that cuts the header into the most columns; a comma where none does."""
    return max(",;\t|", key=lambda separator: len(pd.read_csv(path, sep=separator, nrows=0).columns))


def _read_json_table(path: Path, suffix: str) -> pd.DataFrame:
    if suffix == ".json":
        try:
            return pd.read_json(path)
        except ValueError as error:
            if "Trailing data" not in str(error):
                raise
    return pd.read_json(path, lines=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table as .csv, .jsonl or .parquet, whole or not at all; InputError if it cannot be written there."""
    writers = {
        ".csv": lambda temporary: _write_csv(table, temporary),
        ".jsonl": lambda temporary: table.to_json(temporary, orient="records", lines=True),
        ".parquet": lambda temporary: table.to_parquet(temporary, index=False),
    }
    if path.suffix not in writers:
        raise InputError(f"--out {path}: suffix is {path.suffix!r}, allowed: {', '.join(writers)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writers[path.suffix](temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def csv_chunks(table: pd.DataFrame) -> Iterator[bytes]:
    """Yield the table as CSV, in pieces; about ten times as fast as pandas, with the same values."""
    import pyarrow as pa
    from pyarrow import csv

    yield (",".join(f'"{name}"' if set(name) & set(',"\n') else name for name in table.columns) + "\n").encode()
    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    for start in range(0, len(table), CSV_ROWS):
        columns = pa.Table.from_pandas(table.iloc[start : start + CSV_ROWS], preserve_index=False)
        plain = [pa.string() if pa.types.is_dictionary(field.type) else field.type for field in columns.schema]
        chunk = BytesIO()
        csv.write_csv(columns.cast(pa.schema(zip(columns.column_names, plain, strict=True))), chunk, options)
        yield chunk.getvalue()


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(csv_chunks(table))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; InputError if it is absent or is not one."""
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
    """Return the objects of an append-only JSON-lines file.

    A last line without its newline was cut by a kill and is dropped; any other malformed line is an
    InputError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(f"{path}: not text: {error}") from None
    objects = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
    return objects


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are aligned left, the rest right."""
    rule = [":--" if column < left else "--:" for column in range(len(headers))]
    lines = [headers, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def number(value: object, digits: int = 3) -> str:
    """Return a number for people: `digits` significant digits, thousands grouped, an en dash for what is missing."""
    if not isinstance(value, Real) or value != value:
        return "–"
    value = float(value)
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:#.{digits}g}".replace("-", "−")


def signed(value: object, digits: int = 3) -> str:
    """Format as `number` does, with its sign written out."""
    text = number(value, digits)
    return f"+{text}" if isinstance(value, Real) and float(value) > 0 else text
