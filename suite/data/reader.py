"""The protocol of document streams, and the functions that every stream applies to documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from suite.errors import UserError, reason


class Reader(Protocol):
    """A stream of documents that can be interrupted and resumed.

    `position`, which is JSON, is the place after the last document yielded; a reader created with it resumes there.
    `share` is the fraction read so far, None if unknown. `skipped` counts records without text since creation.
    """

    skipped: int

    @property
    def position(self) -> Any:
        """The place after the last document yielded."""

    def __iter__(self) -> Iterator[str]:
        """Yield the documents from the position on. Raises UserError for records that cannot be read."""

    @property
    def share(self) -> float | None:
        """The fraction read so far."""


def is_held_out(text: str, share: float) -> bool:
    """Return whether a document is in the `share` held out for evaluation: a function of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def parse_object(place: str, line: str | bytes) -> dict[str, Any]:
    """Return the object in a line of JSON.

    Args:
        place: The file and the number of the line, for errors.
        line: The line; bytes are UTF-8.

    Raises:
        UserError: The line is not JSON, or not an object; integers that are too long for Python, and lists that are
            too deep, count as not JSON.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not JSON ({reason(error)}), allowed: one whole object per line; if the file is incomplete, copy"
            " or download it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: got {type(value).__name__}, allowed: one object per line")
    return value


def text_of(place: str, record: Mapping[str, Any], field: str) -> str:
    """Return the text in a record's `field`; null counts as empty.

    Args:
        place: The file and line, or the data set and record number, for errors.
        record: One row.
        field: The name of the text's field.

    Raises:
        UserError: The field is missing or is not Unicode text.
    """
    text = record.get(field, ...)
    if text is None:
        return ""
    if not isinstance(text, str):
        present = ", ".join(sorted(record)) or "none"
        problem = f"not among the fields, which are {present};" if text is ... else f"got {type(text).__name__},"
        raise UserError(f"{place}: data.field {field!r}: {problem} allowed: a field with text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: data.field {field!r}: got half of a surrogate pair, allowed: Unicode text") from None
    return text
