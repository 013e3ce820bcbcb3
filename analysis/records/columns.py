"""Columns of the frame as arrays: numbers, and texts by their number in a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

TEXT = {
    "cell",
    "family",
    "base",
    "split",
    "task",
    "task_version",
    "metric",
    "run",
    "grids",
    "source",
    "confidence",
    "precision",
}
"""Columns of text."""
Columns = dict[str, np.ndarray]
"""Column -> values; those of a column of text are numbers of its Vocabulary."""


class Vocabulary:
    """The texts of a column, each with a number; a missing text is -1."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        """The texts in the order of their numbers."""
        return list(self._numbers)

    def number(self, text: str) -> int:
        """Return the number of a text."""
        return self._numbers.setdefault(text, len(self._numbers))

    def numbers(self, texts: pd.Series) -> np.ndarray:
        """Return the number of each text."""
        codes, distinct = pd.factorize(texts)
        return np.array([*map(self.number, distinct.to_numpy(object)), -1], np.int32)[codes]

    def encoded(self, numbers: np.ndarray) -> pa.Array:
        """Return the texts with these numbers, null where missing."""
        return pa.DictionaryArray.from_arrays(pa.array(numbers, mask=numbers < 0), pa.array(self.texts, pa.string()))


Vocabularies = Mapping[str, Vocabulary]
"""Column of text -> its texts."""


def values_of(table: pd.DataFrame, texts: Vocabularies) -> Columns:
    """Return the columns of a table; those that have a vocabulary are texts, all others numbers."""
    return {
        str(name): texts[str(name)].numbers(column) if name in texts else column.to_numpy()
        for name, column in table.items()
    }


def missing(name: str, rows: int) -> np.ndarray:
    """Return a column without any value."""
    return np.full(rows, -1, np.int32) if name in TEXT else np.full(rows, np.nan)
