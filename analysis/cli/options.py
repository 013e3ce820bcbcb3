"""Options that several verbs share, and how documents are printed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.errors import InputError

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
TableFile = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="CSV, JSON, JSON lines or parquet table of runs")
]
Columns = Annotated[str, typer.Option(help="NAME=EXPRESSION,... as pandas.eval reads them")]
LawName = Annotated[str | None, typer.Option("--law", help="a built-in law, or a law file (.yaml)")]
Formula = Annotated[str | None, typer.Option(help="a law of your own, such as 'L = E + (A*N**-a + B*D**-b)**k'")]
Parameters = Annotated[
    str, typer.Option(help="of --formula: 'E >= 0, k free, 0 <= s <= 1, b = a, a ~ 0.1..1'; default: above 0")
]
Huber = Annotated[
    float | None, typer.Option(metavar="DELTA", help="Huber's loss on log residuals; default: least squares")
]
Residuals = Annotated[str | None, typer.Option(metavar="log|linear", help="scale of residuals; default: the law's")]
Where = Annotated[str | None, typer.Option(metavar="CONDITION", help="fit only rows that satisfy this")]
DropHighest = Annotated[int, typer.Option(metavar="K", help="drop the K highest outputs")]
DropMissing = Annotated[bool, typer.Option("--drop-missing", help="drop rows with missing values")]
Weights = Annotated[str | None, typer.Option(metavar="EXPR", help="weight of each point")]
Fix = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="hold a parameter fixed")]
Seed = Annotated[int, typer.Option(help="seed of starts and resampling")]


def assignments(items: Sequence[str], option: str) -> dict[str, float]:
    """Return numbers by name, from NAME=VALUE."""
    values: dict[str, float] = {}
    for item in items:
        name, _, value = (part.strip() for part in item.partition("="))
        if name in values:
            raise InputError(f"{option}: {name} is given twice")
        try:
            values[name] = float(value)
        except ValueError:
            raise InputError(f"{option}: got {item!r}, allowed: NAME=NUMBER") from None
    return values


def print_json(document: Any) -> None:
    """Print a document as JSON on stdout; NaN and infinities become null."""
    print(json.dumps(_finite(document)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
