"""Tables that are too long to read: the report shows their first rows, and a CSV file next to it holds all of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.records.writing import replacing
from analysis.report.blocks import Block, Table, Text

ROWS = 60
"""Most rows of a table in the report."""


def shortened(blocks: Sequence[Block], folder: Path) -> list[Block]:
    """Return the blocks with tables of at most ROWS rows, each shortened one followed by its CSV file's name.

    Files of an earlier report are removed from the folder. Raises InputError if a file cannot be written.
    """
    for path in folder.glob("*.csv"):
        path.unlink()
    result: list[Block] = []
    for block in blocks:
        if not isinstance(block, Table) or len(block.rows) <= ROWS:
            result.append(block)
            continue
        path = folder / f"{block.name}.csv"
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([block.headers, *block.rows])
        text = f"The first {ROWS} of {len(block.rows):,} rows; all of them: {folder.name}/{path.name}."
        result += [replace(block, rows=block.rows[:ROWS]), Text(text)]
    return result
