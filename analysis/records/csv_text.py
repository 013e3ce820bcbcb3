"""A table as CSV, each value formatted once for all consecutive rows that share it.

Most columns of a frame change only between runs or logged lines, and formatting a number takes far longer than copying
its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 100_000
"""Rows whose values are formatted at once."""
LINES = 4_000
"""Lines joined at once, few enough to stay in the processor's cache."""
RARE, FREQUENT = 0.01, 0.3
"""Changes per row up to which a column changes rarely, as between runs, or frequently, as between logged lines.
Neighbouring columns are joined before they are copied into every row: the first, then both."""


def csv_chunks(table: pa.Table, header: bool = True) -> Iterator[bytes]:
    """Yield the table as CSV in pieces, text in quotes and missing values empty."""
    if header:
        names = (f'"{name}"' if set(name) & set(',"\n') else name for name in table.column_names)
        yield (",".join(names) + "\n").encode()
    for start in range(0, len(table), ROWS):
        yield from _lines(table.slice(start, ROWS))


@dataclass(frozen=True)
class _Stretches:
    """The text of consecutive rows with equal values, and the row after the last of each stretch."""

    texts: pa.Array
    ends: np.ndarray

    def changes(self) -> float:
        """Return the stretches per row."""
        return float(len(self.ends) / self.ends[-1])

    def rows(self) -> pa.Array:
        """Return the stretch of each row."""
        return pa.array(np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0)))


def _lines(table: pa.Table) -> Iterator[bytes]:
    columns = [_formatted(column.combine_chunks()) for column in table.columns]
    columns[-1] = _Stretches(pc.binary_join_element_wise(columns[-1].texts, "", "\n"), columns[-1].ends)
    pieces = _neighbours_joined(_neighbours_joined(columns, RARE), FREQUENT)
    placed = [(piece.texts, piece.rows()) for piece in pieces]
    for start in range(0, len(table), LINES):
        texts = (texts.take(rows.slice(start, LINES)) for texts, rows in placed)
        lines = pc.binary_join_element_wise(*texts, ",")
        length = np.frombuffer(lines.buffers()[1], np.int32)[len(lines)]
        yield lines.buffers()[2].slice(0, length).to_pybytes()


def _formatted(column: pa.Array) -> _Stretches:
    """Return a column's values as the fields of a CSV."""
    is_dictionary = pa.types.is_dictionary(column.type)
    stretches = pc.run_end_encode(column.indices if is_dictionary else column)
    values = column.dictionary.take(stretches.values) if is_dictionary else stretches.values
    texts = values.cast(pa.string())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        texts = pc.binary_join_element_wise('"', pc.replace_substring(texts, '"', '""'), '"', "")
    return _Stretches(texts.fill_null(""), stretches.run_ends.to_numpy())


def _neighbours_joined(columns: Sequence[_Stretches], most: float) -> list[_Stretches]:
    """Return the columns, those next to each other joined if each has at most so many stretches per row."""
    pieces: list[_Stretches] = []
    for is_joined, group in groupby(columns, key=lambda column: column.changes() <= most):
        members = list(group)
        pieces += [_joined(members)] if is_joined and len(members) > 1 else members
    return pieces


def _joined(columns: Sequence[_Stretches]) -> _Stretches:
    """Return neighbouring columns as one, with a stretch wherever one of them changes."""
    is_last = np.zeros(columns[0].ends[-1], bool)
    for column in columns:
        is_last[column.ends - 1] = True
    ends = np.flatnonzero(is_last) + 1
    texts = (column.texts.take(pa.array(np.searchsorted(column.ends, ends))) for column in columns)
    return _Stretches(pc.binary_join_element_wise(*texts, ","), ends)
