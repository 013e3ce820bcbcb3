"""Reading tables of runs from CSV, JSON lines or parquet, and writing frames and Markdown."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO, StringIO
from itertools import takewhile
from lzma import LZMAError
from numbers import Real
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import pandas as pd
import pyarrow as pa

from analysis.errors import InputError
from analysis.records.writing import replacing

FORMATS = ".csv, .tsv, .jsonl, .json or .parquet, all but parquet also with .gz, .bz2, .xz or .zip"
WRITTEN = (".csv", ".jsonl", ".parquet")
"""The suffixes of tables that are written."""
MISSING = {"", "na", "n/a", "nan", "-nan", "null", "none", "#n/a", "<na>"}
"""What stands for a missing number in a CSV, in lower case."""
SEPARATOR_LINE = re.compile(r"sep=(.)\s*$", re.IGNORECASE)
"""The line with which Excel states the separator."""


def read_table(path: Path) -> pd.DataFrame:
    """Return the table in a file, by its suffix; InputError if it is absent, empty, of another kind or malformed.

    A .csv may be separated by commas, semicolons, tabs or bars; a .json may hold an array of objects, or one a line.
    Named indexes of parquet are columns. A column is either numbers or labels: NA and None are missing numbers in the
    one and labels in the other, and numbers never become dates.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, allowed: a file' if path.is_dir() else 'no such file'}")
    suffix = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    try:
        if suffix in (".csv", ".tsv"):
            table = _read_csv(_read_text(path), "\t" if suffix == ".tsv" else None)
        elif suffix in (".jsonl", ".json", ".ndjson"):
            table = _read_json_table(_read_text(path))
        elif path.suffix in (".parquet", ".pq"):
            table = pd.read_parquet(path)
            table = table.reset_index([name for name in table.index.names if name is not None])
        else:
            raise InputError(f"{path}: suffix is {suffix or 'missing'!r}, allowed: {FORMATS}")
    except (ValueError, OSError, EOFError, BadZipFile, LZMAError, RecursionError, csv.Error) as error:
        reason = str(error).splitlines()[0].partition("; use sys.")[0]  # of an integer too long for Python
        raise InputError(f"{path}: not readable as {suffix}: {reason}") from None
    if table.empty:
        raise InputError(f"{path}: no rows")
    return table


def _read_text(path: Path) -> str:
    """Return the text of a file that may be compressed, without a byte-order mark."""
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        return str(file.read().decode("utf-8-sig"))


def _open_zip(path: Path, mode: str) -> IO[bytes]:
    with ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != 1:
            raise ValueError(f"holds {len(names)} files; a table is a single file")
        return BytesIO(archive.read(names[0]))


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zip": _open_zip}
"""How a compressed file is opened, by suffix."""


def _read_csv(text: str, separator: str | None) -> pd.DataFrame:
    """Return the table in a text; comments and Excel's `sep=;` before the header are skipped.

    Without a separator it is the one of the usual ones that splits the header into the most columns.
    """
    lines = [*StringIO(text, newline=None)]
    skipped = [*takewhile(lambda line: line.startswith("#") or SEPARATOR_LINE.match(line), lines)]
    for match in map(SEPARATOR_LINE.match, skipped):
        separator = match[1] if match else separator
    body = lines[len(skipped) :]
    header = next((line for line in body if line.strip()), "")
    reader = csv.reader(body, delimiter=separator or max(",;\t|", key=header.count), skipinitialspace=True)
    names: list[str] = []
    rows: list[list[str]] = []
    for row in reader:
        values = [value.strip() for value in row]
        if not any(values):
            continue
        if not names:
            names = [name or f"Unnamed: {number}" for number, name in enumerate(values)]
            continue
        if any(values[len(names) :]):
            line = len(skipped) + reader.line_num
            raise ValueError(f"line {line}: {len(values)} values, but the header has {len(names)} columns")
        rows.append([*values[: len(names)], *[""] * (len(names) - len(values))])
    if not names:
        raise ValueError("the file is empty")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"column {repeated[0]!r} is in the header twice")
    table = pd.DataFrame(rows, columns=names, dtype=str)
    empty = [name for name in names if name.startswith("Unnamed:") and not table[name].any()]
    return pd.DataFrame({name: _typed(table[name]) for name in names if name not in empty}, index=table.index)


def _typed(texts: pd.Series) -> pd.Series:
    """Return a column of a CSV as numbers or truth values if all of its values are, otherwise as labels."""
    present = texts[~texts.str.lower().isin(MISSING)]
    if present.empty and not texts.isin(("", "nan", "NaN")).all():
        return texts
    numbers = pd.to_numeric(present, errors="coerce")
    if numbers.notna().all():
        return numbers.reindex(texts.index)
    truths = texts.str.lower().map({"true": True, "false": False})
    return truths.astype(bool) if truths.notna().all() else texts.where(texts != "")


def _read_json_table(text: str) -> pd.DataFrame:
    """Return the table in a JSON document, or in one object per line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        content = _json_lines(text)
    if isinstance(content, dict) and not any(isinstance(value, dict | list) for value in content.values()):
        content = [content]
    if isinstance(content, list):
        content = [_object(value, f"element {number}") for number, value in enumerate(content, 1)]
    elif not isinstance(content, dict):
        raise ValueError(f"got {json.dumps(content)[:40]}, allowed: an array of objects")
    table = pd.DataFrame(content)
    return pd.DataFrame({name: _typed_objects(table[name]) for name in table}, index=table.index)


def _json_lines(text: str) -> list[dict[str, Any]]:
    """Return the objects of JSON lines; a ValueError names the line."""
    objects = []
    for number, line in enumerate(StringIO(text, newline=None), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            objects.append(_object(value, f"line {number}"))
    return objects


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {json.dumps(value)[:40]}, allowed: an object")
    return value


def _typed_objects(values: pd.Series) -> pd.Series:
    """Return a column of JSON values; integers above 2^64, which pandas cannot hold, become floats."""
    if values.dtype != object or not values.dropna().map(lambda value: isinstance(value, int | float)).all():
        return values
    return values if values.dropna().map(lambda value: isinstance(value, bool)).any() else values.astype(float)


def check_target(path: Path) -> None:
    """Raise InputError if the suffix or the folder of a path shows that no table can be written there."""
    if path.suffix not in WRITTEN:
        raise InputError(f"--out {path}: suffix is {path.suffix!r}, allowed: {', '.join(WRITTEN)}")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: cannot be written: {path.parent} is not a folder")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table as .csv, .jsonl or .parquet, complete or not at all; InputError if it cannot be written there."""
    write(path, lambda: table, lambda: [pa.Table.from_pandas(table, preserve_index=False)])


def write(path: Path, whole: Callable[[], pd.DataFrame], parts: Callable[[], Iterable[pa.Table]]) -> int:
    """Write a table as `write_table` does and return the number of its rows; a .csv is written part by part.

    Args:
        path: The file.
        whole: Returns the table.
        parts: Returns its rows in parts, with the same columns and types.

    Raises:
        InputError: The file cannot be written, or its suffix is another.
    """
    writers: dict[str, Callable[[Path], int]] = {
        ".csv": lambda temporary: _write_csv(parts(), temporary),
        ".jsonl": lambda temporary: _write_json_lines(whole(), temporary),
        ".parquet": lambda temporary: _write_parquet(whole(), temporary),
    }
    check_target(path)
    with replacing(path, "--out") as temporary:
        return writers[path.suffix](temporary)


def _write_csv(parts: Iterable[pa.Table], path: Path) -> int:
    from analysis.records.csv_text import csv_chunks

    rows = 0
    with path.open("wb") as file:
        for number, part in enumerate(parts):
            file.writelines(csv_chunks(part, header=number == 0))
            rows += len(part)
    return rows


def _write_json_lines(table: pd.DataFrame, path: Path) -> int:
    table.to_json(path, orient="records", lines=True)
    return len(table)


def _write_parquet(table: pd.DataFrame, path: Path) -> int:
    table.to_parquet(path, index=False)
    return len(table)


def _parse(text: str) -> Any:
    """Return the value of JSON as records hold it, without NaN and infinity. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; InputError if it is absent or is not one."""
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, allowed: a JSON object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of an append-only JSON-lines file.

    A last line without its newline was truncated by an interruption and is dropped; any other malformed line is an
    InputError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise InputError(f"{path}: not text: {error}") from None
    objects = []
    for number, line in enumerate(StringIO(text[: text.rfind("\n") + 1]), 1):
        try:
            objects.append(_parse(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
    return objects


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are aligned left, the rest right.

    Args:
        headers: The column headers.
        rows: The rows.
        left: Number of columns aligned left.
    """
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
