"""The report of a grid, made by another process because analysis is independent of torch and suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TextIO

from suite.records import GRIDS


def report_path(results: Path, grid: str) -> Path:
    """Return the path of a grid's report."""
    return results / GRIDS / grid / "report.md"


def report_command(results: Path, grid: str) -> list[str]:
    """Return the command that fits and draws."""
    return [sys.executable, "-m", "analysis", "report", "--grid", grid, "--results", str(results)]


def write_report(results: Path, grid: str, stdout: TextIO | None = None) -> bool:
    """Fit and draw; returns whether a new report was written.

    The exit code does not show this: it is also 1 if the report lists failed or damaged runs.

    Args:
        results: The results folder.
        grid: The grid's name.
        stdout: Where the command's output goes; None: standard output.
    """
    before = _written_at(results, grid)
    done = subprocess.run(report_command(results, grid), stdout=stdout)
    return done.returncode == 0 or _written_at(results, grid) != before


def _written_at(results: Path, grid: str) -> int | None:
    path = report_path(results, grid)
    return path.stat().st_mtime_ns if path.exists() else None
