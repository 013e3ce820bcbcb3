"""The record files of all runs as one columnar table, and its Parquet cache.

The table has one row per run directory. Scalars are columns; what a run has many of (logged lines, probe scores, table
use, final scores) is a list column. The cache is in results/cache/analysis. A row of it is used only while the
signature of its run's files is unchanged: name, mtime in nanoseconds, size and inode of each. Other runs are read
again, and rows of removed runs are dropped. The cache file is replaced atomically, so several commands may read and
write it at once. If it cannot be written (read-only results), it is not updated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.records.run_files import LISTS, SCALARS, Row, is_record, read_run

VERSION = "3"
"""Raise it when the meaning of a column changes; a change of columns is noticed without."""
CACHE = Path("cache", "analysis", "records.parquet")
SCORES = ("eval", "eval/steps")
"""Folders of score files in a run directory."""
BATCH = 500
"""Runs parsed before their Python objects become columns."""


def _list_type(fields: Sequence[str]) -> pa.DataType:
    element = pa.struct([(name, pa.string() if name in TEXT else pa.float64()) for name in fields])
    return pa.list_(pa.field("element", element))  # Parquet's name for list entries, as it is read back


TEXT = {
    "kind",
    "split",
    "task",
    "metric",
    "version",
    "prompt_hash",
    "data_fingerprint",
    "precision",
    "answers",
    "source",
    "form",
}
"""Fields of the list columns that hold text; all others are numbers."""
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("signature", pa.string()),
        *((name, pa.string() if text else pa.float64()) for name, text in SCALARS.items()),
        *((name, _list_type(fields)) for name, fields in LISTS.items()),
    ],
    metadata={"version": VERSION},
)


def load(results: Path, columns: Sequence[str], names: Iterable[str] | None = None) -> pa.Table:
    """Return the run table of a results folder, its cache brought up to date.

    Args:
        results: The folder of runs/ and cache/.
        columns: Columns of SCHEMA that the caller needs; `run` always comes first.
        names: Runs to load, in this order; those without a directory are left out. None: all, by name.

    Returns:
        One row per run directory.
    """
    wanted = None if names is None else list(names)
    signatures = scan(results, wanted)
    path = results / CACHE
    cached = _cached_signatures(path)
    fresh = {name for name, signature in signatures.items() if cached.get(name) == signature}
    vanished = set() if wanted is not None else cached.keys() - signatures.keys()
    if len(fresh) == len(signatures) and not vanished:
        table = _read(path, ["run", *columns]) if signatures else SCHEMA.empty_table().select(["run", *columns])
        if table is not None and set(signatures) <= set(table["run"].to_pylist()):
            return _in_order(table, signatures)
        fresh = set()
    table = _update(results, path, signatures, fresh, keep_others=wanted is not None)
    return _in_order(table.select(["run", *columns]), signatures)


def scan(results: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """Run name -> signature of its record files, for every run directory that has any."""
    folder = results / "runs"
    if names is None:
        try:
            names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return {}
    signatures = {name: _signature(f"{folder}/{name}") for name in names}
    return {name: signature for name, signature in signatures.items() if signature}


def _signature(folder: str) -> str:
    """Return the record files of a run directory with what changes when they do; empty without any."""
    return ";".join(sorted(_file_signatures(folder, "")))


def _file_signatures(folder: str, prefix: str) -> Iterator[str]:
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            name = prefix + entry.name
            if name in SCORES:
                yield from _file_signatures(entry.path, f"{name}/")
            elif is_record(name):
                stat = entry.stat()
                yield f"{name}:{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def _cached_signatures(path: Path) -> dict[str, str]:
    table = _read(path, ["run", "signature"])
    return {} if table is None else dict(zip(table["run"].to_pylist(), table["signature"].to_pylist(), strict=True))


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Return the columns of the cache; None if there is no cache, or one that is damaged or has another schema."""
    try:
        with path.open("rb") as file:
            parquet = pq.ParquetFile(file)
            if not parquet.schema_arrow.equals(SCHEMA, check_metadata=True):
                return None
            return parquet.read(columns=columns)
    except (OSError, pa.ArrowException):
        return None


def _update(results: Path, path: Path, signatures: dict[str, str], fresh: set[str], keep_others: bool) -> pa.Table:
    """Return the whole table with every run of `signatures` as its files are now; written to the cache."""
    old = _read(path)
    parts = []
    if old is not None:
        reusable = [name in fresh or (keep_others and name not in signatures) for name in old["run"].to_pylist()]
        parts.append(old.filter(pa.array(reusable, pa.bool_())))
        fresh = fresh & set(parts[0]["run"].to_pylist())
    else:
        fresh = set()
    changed = [name for name in signatures if name not in fresh]
    for start in range(0, len(changed), BATCH):
        names = changed[start : start + BATCH]
        parts.append(to_columns([read_run(results / "runs" / name) for name in names], signatures))
    table = pa.concat_tables(parts).combine_chunks() if parts else SCHEMA.empty_table()
    _write(table.replace_schema_metadata(SCHEMA.metadata), path)
    return table


def to_columns(rows: Sequence[Row], signatures: dict[str, str]) -> pa.Table:
    """Return parsed runs as rows of the table."""
    names = [row.name for row in rows]
    columns: list[pa.Array] = [pa.array(names, pa.string()), pa.array([signatures[name] for name in names])]
    for name in SCALARS:
        columns.append(pa.array([row.scalars.get(name) for row in rows], SCHEMA.field(name).type))
    for name, fields in LISTS.items():
        items = [row.lists[name] for row in rows]
        offsets = pa.array([0, *_cumulative(len(item) for item in items)], pa.int32())
        flat = list(zip(*(values for item in items for values in item), strict=True)) or [()] * len(fields)
        kind = SCHEMA.field(name).type.value_type
        leaves = [pa.array(values, kind.field(at).type) for at, values in enumerate(flat)]
        columns.append(
            pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays(leaves, fields=list(kind)), SCHEMA.field(name).type
            )
        )
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _cumulative(lengths: Iterable[int]) -> list[int]:
    total, sums = 0, []
    for length in lengths:
        total += length
        sums.append(total)
    return sums


def _write(table: pa.Table, path: Path) -> None:
    """Replace the cache in one step, or do without where the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _in_order(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """Return the rows of these runs, in this order."""
    wanted = pa.chunked_array([pa.array(list(names), pa.string())])
    if table["run"].equals(wanted):
        return table
    return table.take(pc.index_in(wanted, value_set=table["run"].combine_chunks()))


def unnest(table: pa.Table, column: str, position: np.ndarray) -> pd.DataFrame:
    """Return a list column as a table of its entries, with the position of their run; -1 leaves a run's entries out.

    Args:
        table: The run table.
        column: A list column.
        position: The position of each run in the result's `run`; -1 omits a run.
    """
    lists = table[column].combine_chunks()
    entries = lists.flatten()
    run = position[np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy(zero_copy_only=False))]
    frame = pa.Table.from_struct_array(entries).to_pandas(split_blocks=True)
    frame.insert(0, "run", run)
    if (run >= 0).all() and (np.diff(run) >= 0).all():
        return frame
    return frame[frame["run"] >= 0].sort_values("run", kind="stable", ignore_index=True)
