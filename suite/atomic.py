"""Files that are complete or absent: written to a temporary file, synced to disk, and renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suite.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which there is no space: on the disk, in the user's quota, or within a limit on files."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskFull, which names `path`, if the file system has no space for what is written there."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        remedy = "free space, and the same command continues"
        raise DiskFull(f"{path}: cannot be written: {error.strerror}; {remedy}") from None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically; missing parent folders are created. Raises DiskFull."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError for NaN and infinity, and DiskFull."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
