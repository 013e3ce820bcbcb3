"""Which code makes a run's weights, and whether a run on disk was made by this code."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from suite.cells import Cell, identity
from suite.records import RunDir

PACKAGES = Path(__file__).resolve().parents[2]
WEIGHT_MAKERS = (
    "suite/models/**/*.py",
    "suite/data/**/*.py",
    "suite/train/**/*.py",
    "kernels/**/*.py",
    "suite/inference/*.py",
)
"""The code that decides what the weights become, and the probes on the way: they may end a run."""


@functools.cache
def code_version() -> str:
    """Twelve hex digits of the source that makes the weights.

    Comments, docstrings and layout do not count: each file is parsed and written back without them.
    """
    digest = hashlib.sha256()
    for pattern in WEIGHT_MAKERS:
        for path in sorted(PACKAGES.glob(pattern)):
            digest.update(f"{path.relative_to(PACKAGES).as_posix()}\n{bare_source(path.read_text())}\n".encode())
    return digest.hexdigest()[:12]


def bare_source(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [child for child in node.body if not _is_text(child)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def versions() -> dict[str, str]:
    """What made a run: our code, Python and the libraries whose numbers end up in the weights."""
    found = {"code": code_version(), "python": platform.python_version()}
    for package in ("torch", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def stale_because(run: RunDir, cell: Cell) -> str | None:
    """Why the run on disk cannot stand for `cell`: made by other code, or under other defaults; None if it can.

    A run that has no checkpoint yet is never stale: it is trained from its first step when it starts.
    """
    if not run.cell_path.exists() or not _has_weights(run):
        return None
    made_by = run.read_record().get("versions", {}).get("code")
    if made_by != code_version():
        return f"made by code {made_by}, this is {code_version()}"
    if identity(run.read_cell()) != identity(cell):
        return "its cell.json differs from the grid's cell: a default has changed since"
    return None


def _has_weights(run: RunDir) -> bool:
    return run.state()["state"] == "done" or any(run.checkpoints.glob("step-*"))
