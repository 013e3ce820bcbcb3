"""Loads families from outside the package: a Python file at a path, or an installed package's entry point.

A file registers its families when it is executed. Files are identified by content: the same content is executed once,
and its hash is part of the identity of every cell of its families.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from suite.errors import UserError
from suite.models import registry

ENTRY_POINTS = "next_parameter.baselines"
"""The group of entry points whose modules are loaded as baselines."""


def load(path: Path, where: str = "--baseline") -> list[str]:
    """Execute a baseline's file and return the names of its families; `where` names the option in error messages.

    Raises UserError, which names the file, if it cannot be executed or registers nothing.
    """
    try:
        source = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{where}: got {str(path)!r}: {error.strerror}, allowed: a Python file") from None
    loaded = [name for name in registry.families() if registry.family(name).source == source]
    if loaded:
        return loaded
    before = registry.families()
    try:
        _execute(path, source)
    except (Exception, SystemExit) as error:
        registry.unregister(set(registry.families()) - set(before))
        raise UserError(f"{where} {path}: {error_line(error, path)}") from None
    added = [name for name in registry.families() if name not in before]
    if not added:
        raise UserError(f"{where} {path}: the file registers no family; call suite.baselines.register in it")
    for name in added:
        registry.set_origin(name, source, path)
    return added


def load_all(paths: Iterable[Path] = ()) -> None:
    """Load the baselines of installed packages, then those of these files. Raises UserError."""
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(entry_point.value)
        where = f"entry point {entry_point.name}"
        if spec is None or spec.origin is None:
            raise UserError(f"{where}: got {entry_point.value!r}, allowed: an installed module")
        load(Path(spec.origin), where)
    for path in paths:
        load(path)


@contextlib.contextmanager
def reported(family: str) -> Iterator[None]:
    """Raise an exception of the block as a UserError of one line if the family comes from a baseline's file."""
    path = registry.family(family).path
    try:
        yield
    except Exception as error:
        if path is None:
            raise
        raise UserError(f"{path}: family {family}: {error_line(error, path)}") from None


def error_line(error: BaseException, path: Path) -> str:
    """Return an error as one line, with its type and line number if the baseline's own file raised it."""
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"line {error.lineno or 1}: {error.msg}, allowed: Python"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"line {lines[-1]}: {type(error).__name__}: {message}" if lines else message


def _execute(path: Path, source: str) -> None:
    spec = importlib.util.spec_from_file_location(f"baseline_{source[:12]}", path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file, allowed: a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries results only
        spec.loader.exec_module(module)
