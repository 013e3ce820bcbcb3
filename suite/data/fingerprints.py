"""Fingerprints of data files: computed once per process, and compared with the one that a cell states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from suite.errors import UserError


def cached(fingerprint: Callable[[Path], str], path: Path, files: Iterable[Path]) -> str:
    """Return `fingerprint(path)`, computed once for all cells of a grid.

    Args:
        fingerprint: Hashes the content of `path`.
        path: A file or folder.
        files: The files it consists of; a change in their sizes or modification times recomputes the fingerprint.
    """
    return _cached(fingerprint, path, tuple(_stamp(file) for file in files))


def check(field: str, path: Path, actual: str, expected: str | None) -> None:
    """Raise UserError if a cell states a fingerprint and that of the file differs.

    Args:
        field: The dotted field that names the path, such as `data.tokenizer.path`.
        path: The file or folder.
        actual: The fingerprint of its content.
        expected: The fingerprint that the cell states, or None.
    """
    if expected not in (None, actual):
        raise UserError(
            f"{field}: got {str(path)!r} with the content {actual[:12]}..., allowed: the content {expected[:12]}..."
            " of the cell's fingerprint"
        )


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _cached(fingerprint: Callable[[Path], str], path: Path, _stamps: tuple[tuple[str, int, int], ...]) -> str:
    return fingerprint(path)
