"""Fingerprints of data files: computed once per process, and compared with the one that a cell names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from suite.errors import UserError


def cached(fingerprint: Callable[[Path], str], path: Path, files: Iterable[Path]) -> str:
    """`fingerprint(path)`, computed once for all cells of a grid.

    Args:
        fingerprint: hashes the content of `path`.
        path: a file or folder.
        files: the files it consists of; a change in their sizes or modification times recomputes the fingerprint.
    """
    return _cached(fingerprint, path, tuple(_stamp(file) for file in files))


def check(field: str, path: Path, actual: str, expected: str | None) -> None:
    """Raise UserError if a cell names a fingerprint and the file has another.

    Args:
        field: the dotted field that names the path, such as `data.tokenizer.path`.
        path: the file or folder.
        actual: the fingerprint of its content.
        expected: the fingerprint that the cell names, or None.
    """
    if expected not in (None, actual):
        raise UserError(
            f"{field}: got {str(path)!r} with the content {actual[:12]}..., allowed: the content {expected[:12]}..."
            " that the cell's fingerprint names"
        )


def _stamp(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _cached(fingerprint: Callable[[Path], str], path: Path, _stamps: tuple[tuple[str, int, int], ...]) -> str:
    return fingerprint(path)
