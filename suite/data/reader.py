"""A stream of documents, and what every stream does with each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from suite.errors import UserError


class Reader(Protocol):
    """A stream of documents that can be interrupted and resumed.

    `position` is JSON: where the stream is after the last document yielded; a reader created with it resumes there.
    `share` is the fraction read so far, None if unknown. `skipped` counts records without text since creation.
    """

    skipped: int

    @property
    def position(self) -> Any:
        """Where the stream is."""

    def __iter__(self) -> Iterator[str]:
        """The documents from the position on. Raises UserError for records that cannot be read."""

    @property
    def share(self) -> float | None:
        """The fraction read so far."""


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is in the `share` held out for evaluation: a function of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def text_of(place: str, record: Mapping[str, Any], field: str) -> str:
    """The text in a record's `field`; null counts as empty.

    Args:
        place: the file and line, or the data set and record number, for errors.
        record: one row.
        field: the name of the text's field.

    Raises:
        UserError: the field is missing or is not Unicode text.
    """
    text = record.get(field, ...)
    if text is None:
        return ""
    if not isinstance(text, str):
        given = f"only {', '.join(sorted(record)) or 'nothing'}" if text is ... else f"a {type(text).__name__}"
        raise UserError(f"{place}: data.field {field!r}: got {given}, allowed: a field with text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: data.field {field!r}: got half of a surrogate pair, allowed: Unicode text") from None
    return text
