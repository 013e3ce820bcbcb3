"""Which code makes a run's weights, and whether the weights on disk were made by this code."""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from suite.cells import Cell
from suite.identity import identity
from suite.records import DamagedRecord, Records, RunDir

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = "next_parameter_data"

WEIGHT_SOURCES = (
    "suite/cells.py",
    "suite/trainable.py",
    "suite/models/**/*.py",
    "suite/data/**/*.py",
    "suite/train/**/*.py",
    "suite/inference/batching.py",
    "suite/inference/loglikelihood.py",
    "kernels/**/*.py",
    "kernels/**/*.[ch]",
    "kernels/**/*.cu",
)
"""The sources that decide what the weights become. The probes are among them, since they may end a run."""

NOT_WEIGHT_SOURCES = (
    "suite/models/dropin.py",
    "suite/data/preparing.py",
    "suite/train/reporting/loggers.py",
    "suite/train/reporting/telemetry.py",
    "kernels/bench/*.py",
)
"""Files that the patterns above match and that no training executes."""


def weight_sources(root: Path) -> Iterator[Path]:
    """Yield the files below `root` that make weights, in a fixed order."""
    excluded = {path for pattern in NOT_WEIGHT_SOURCES for path in _base(root, pattern).glob(pattern)}
    included = {path for pattern in WEIGHT_SOURCES for path in _base(root, pattern).glob(pattern)}
    yield from sorted(included - excluded)


def _base(root: Path, pattern: str) -> Path:
    """Return where a pattern starts: operators are installed in a folder of their own (see setup.py)."""
    installed = root / INSTALLED
    return installed if pattern.startswith("kernels/") and (installed / "kernels").is_dir() else root


@functools.cache
def code_version(root: Path = ROOT) -> str:
    """Return twelve hex digits of the sources that make the weights.

    Comments, docstrings and layout do not count.
    """
    digest = hashlib.sha256()
    for path in weight_sources(root):
        bare = bare_python if path.suffix == ".py" else bare_c
        digest.update(
            f"{path.relative_to(root).as_posix().removeprefix(f'{INSTALLED}/')}\n{bare(path.read_text(encoding='utf-8'))}\n".encode()
        )
    return digest.hexdigest()[:12]


def bare_python(source: str) -> str:
    """Return Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [child for child in node.body if not _is_text(child)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


C_LITERAL = r'"(?:\\.|[^"\\])*"' + r"|'(?:\\.|[^'\\])*'"
C_COMMENT = re.compile(rf"({C_LITERAL})|//[^\n]*|/\*.*?\*/", re.DOTALL)
C_TOKEN = re.compile(rf"{C_LITERAL}|[\w.]+|<<=|>>=|->|\+\+|--|<<|>>|[-+*/%&|^<>=!]=|&&|\|\||\S")


def bare_c(source: str) -> str:
    """Return C source without comments and layout: its tokens, and its preprocessor lines one by one.

    In a preprocessor line a space can change the meaning, so only runs of spaces are shortened.
    """
    joined = source.replace("\\\n", "")
    parts: list[str] = []
    for line in C_COMMENT.sub(lambda match: match[1] or " ", joined).splitlines():
        is_directive = line.lstrip().startswith("#")
        parts += ["\n", *line.split(), "\n"] if is_directive else C_TOKEN.findall(line)
    return " ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of what makes a run: our code, Python, and the libraries whose numbers end up in the
    weights."""
    installed = {"code": code_version(), "python": platform.python_version()}
    for package in ("torch", "numpy", "tokenizers"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def device_name() -> str:
    """Return the device that trains here: the name of the GPU, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def stale_because(run: RunDir, cell: Cell) -> str | None:
    """Return why the run on disk cannot be used for `cell` (other code, or other defaults); None if it can.

    A run without a checkpoint is never stale: it is trained from its first step when it starts. Nor is an imported one,
    whose weights no code of this project made. A damaged run is not stale either: nothing is known of the code that
    made it.
    """
    try:
        return stale_because_of(run, cell, run.read_all())
    except DamagedRecord:
        return None


def stale_because_of(run: RunDir, cell: Cell, records: Records) -> str | None:
    """Return what `stale_because` does, for a run whose records have been read."""
    record = records.record
    if cell.imported is not None or record is None or not _has_weights(run, records):
        return None
    made_by = record.get("versions", {}).get("code")
    if made_by != code_version():
        return f"made by code {made_by}, this is {code_version()}"
    # Equal fields need no validation, which takes far longer than the comparison.
    if record["cell"] != cell.model_dump(mode="json") and identity(run.read_cell()) != identity(cell):
        return "its cell.json differs from the grid's cell: a default has changed since"
    return None


def _has_weights(run: RunDir, records: Records) -> bool:
    return records.state["state"] == "done" or any(run.checkpoints.glob("step-*"))
