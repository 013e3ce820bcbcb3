"""Options that several verbs share, and how documents are printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

Results = Annotated[Path, typer.Option("--results", metavar="DIR", help="folder of runs/ and grids/")]
Grid = Annotated[str | None, typer.Option("--grid", metavar="NAME", help="one grid; default: all runs")]
REFERENCE = "dense"
"""Family that the others are compared with, unless a grid's contrast or an option names another."""
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="FAMILY",
        help=f"family that the others are compared with; default: that of the grid's contrast, or {REFERENCE}",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]
FigureFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder of the figures")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="CSV, JSON, JSON lines or parquet table of runs")
]


def print_json(document: Any) -> None:
    """Print a document as JSON on stdout; NaN and infinities become null."""
    print(json.dumps(_finite(document)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
