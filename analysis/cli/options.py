"""Options that several verbs share, and how documents are printed."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
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
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout; everything else goes to stderr")
]
FigureFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder of the figures")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="CSV, JSON, JSON lines or parquet table of runs")
]
TableFile = Annotated[
    Path, typer.Option("--data", metavar="FILE", help="CSV, JSON, JSON lines or parquet table of runs")
]
COLUMNS = "inputs and outcome of the law: NAME=EXPRESSION,... in the syntax of pandas.eval"
Columns = Annotated[str, typer.Option(help=COLUMNS)]
LawName = Annotated[str | None, typer.Option("--law", help="a built-in law, or a law file (.yaml)")]
Formula = Annotated[str | None, typer.Option(help="a law of your own, such as 'L = E + (A*N**-a + B*D**-b)**k'")]
Parameters = Annotated[
    str,
    typer.Option(
        help="with --formula: bounds and ties of its parameters, such as 'E >= 0, k free, 0 <= s <= 1, b = a, "
        "a ~ 0.1..1'; default: all above 0"
    ),
]
Fix = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="hold a parameter fixed; repeatable")]


@dataclass(frozen=True)
class FitOptions:
    """The options of every verb that fits a law: fields of `Request` of the same names."""

    huber: Annotated[
        float | None, typer.Option(metavar="DELTA", help="Huber's loss on log residuals; default: least squares")
    ] = None
    residuals: Annotated[
        str | None, typer.Option(metavar="log|linear", help="scale of residuals; default: the law's")
    ] = None
    where: Annotated[str | None, typer.Option(metavar="CONDITION", help="fit only rows that satisfy this")] = None
    drop_highest: Annotated[int, typer.Option(metavar="K", help="drop the K highest outputs")] = 0
    drop_missing: Annotated[bool, typer.Option("--drop-missing", help="drop rows with missing values")] = False
    weights: Annotated[str | None, typer.Option(metavar="EXPR", help="weight of each point")] = None
    seed: Annotated[int, typer.Option(help="seed of starts and resampling")] = 0

    def fields(self) -> dict[str, Any]:
        """Return the values by the names of `Request`'s fields."""
        return asdict(self)


def expand_options(verb: Callable[..., int]) -> Callable[..., int]:
    """Make each field of a verb's dataclass of options an option of the command, after the verb's own options.

    Typer reads options from the signature of a function. In the signature of the returned function, the fields of the
    dataclass replace the parameter that holds it.
    """
    parameters = inspect.signature(verb, eval_str=True).parameters
    (group,) = (parameter for parameter in parameters.values() if is_dataclass(parameter.annotation))
    fields = inspect.signature(group.annotation, eval_str=True).parameters

    @functools.wraps(verb)
    def command(**arguments: Any) -> int:
        options = group.annotation(**{name: arguments.pop(name) for name in fields})
        return verb(**arguments, **{group.name: options})

    own = [parameter for parameter in parameters.values() if parameter.name != group.name]
    flat = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *fields.values())]
    command.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return command


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
