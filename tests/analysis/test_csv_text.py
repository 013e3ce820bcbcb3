"""CSV text against the writer of pyarrow."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import csv as arrow_csv

from analysis.records.csv_text import csv_chunks


def of_pyarrow(table: pd.DataFrame) -> bytes:
    """Return the table as CSV, written by pyarrow with categories as text."""
    columns = pa.Table.from_pandas(table, preserve_index=False)
    plain = [pa.string() if pa.types.is_dictionary(field.type) else field.type for field in columns.schema]
    text = BytesIO()
    options = arrow_csv.WriteOptions(include_header=False, quoting_style="needed")
    arrow_csv.write_csv(columns.cast(pa.schema(zip(columns.column_names, plain, strict=True))), text, options)
    return (",".join(table.columns) + "\n").encode() + text.getvalue()


@pytest.mark.parametrize("rows", [1, 2, 7, 4001, 100_001])
def test_the_text_equals_that_of_pyarrow_for_values_that_change_rarely_frequently_and_always(rows: int) -> None:
    random = np.random.default_rng(rows)
    rare = np.arange(rows) // 500
    table = pd.DataFrame(
        {
            "constant": 1.0,
            "missing": np.nan,
            "no_category": pd.Categorical([None] * rows),
            "rare": rare % 7 / 10,
            "rare_text": pd.Categorical(np.array(["x", 'q"u', "a,b", "n\nl", ""])[rare % 5]),
            "frequent": np.where(np.arange(rows) % 8 < 4, np.nan, 1e22),
            "frequent_text": pd.Categorical.from_codes(np.arange(rows) // 4 % 3 - 1, ["u", "v"]),
            "whole": np.arange(rows),
            "value": random.standard_normal(rows) * 10.0 ** random.integers(-9, 20, rows),
            "text": random.choice(["x", 'q"', None], rows),
            "truth": random.random(rows) < 0.5,
            "special": random.choice([-0.0, np.inf, np.nan, 0.1], rows),
        }
    )
    assert b"".join(csv_chunks(pa.Table.from_pandas(table))) == of_pyarrow(table)


def test_a_table_without_rows_has_a_header() -> None:
    assert b"".join(csv_chunks(pa.table({"a": [], "b,c": []}))) == b'a,"b,c"\n'
