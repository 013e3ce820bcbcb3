"""Files that are complete or absent: written under a temporary name, and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.errors import InputError


@contextmanager
def replacing(path: Path, option: str = "") -> Iterator[Path]:
    """Yield a path next to `path`, which replaces it at the end; after an error `path` is as before.

    Args:
        path: The file to write; its folder is created.
        option: The option that names it, for messages.

    Raises:
        InputError: The file cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}".strip() + f": cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str, option: str = "") -> None:
    """Write a text file as UTF-8; arguments and errors as for `replacing`."""
    with replacing(path, option) as temporary:
        temporary.write_text(text, encoding="utf-8")
