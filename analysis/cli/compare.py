"""The `compare` verb: families of any table of runs against a reference family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.options import AsJson, print_json
from analysis.errors import InputError

EXAMPLE = (
    "Example: python -m analysis compare --data runs.csv "
    '--columns "family=family,cell=size,seed=seed,C=flops,y=loss" --json'
)


def compare(
    data: Annotated[Path, typer.Option(metavar="FILE", help="CSV, JSON, JSON lines or parquet table of runs")],
    columns: Annotated[
        str, typer.Option(help="NAME=EXPRESSION,...: family and y; C, cell, seed, params, bytes where available")
    ],
    reference: Annotated[str, typer.Option(help="family that all others are compared with")] = "dense",
    primary: Annotated[
        str | None, typer.Option(metavar="FAMILY:CELL", help="the one contrast whose p-value is not adjusted")
    ] = None,
    where: Annotated[str | None, typer.Option(metavar="CONDITION", help="use only rows that satisfy this")] = None,
    bootstrap: Annotated[int, typer.Option(metavar="DRAWS", help="resamples of runs for the multipliers")] = 1000,
    seed: Annotated[int, typer.Option(help="seed of the resampling")] = 0,
    as_json: AsJson = False,
) -> int:
    """Compare the families in a table of runs with a reference: paired differences and compute multipliers."""
    from analysis.comparisons import table_file
    from analysis.fits.columns import prepared
    from analysis.records.tables import read_table

    if bootstrap < 1 or seed < 0:
        raise InputError("--bootstrap: allowed: 1 or more; --seed: 0 or more")
    runs = table_file.columns_of(prepared(read_table(data)), columns, where)
    result = table_file.compare(runs, reference, primary, bootstrap, seed)
    if as_json:
        print_json(result)
    else:
        print(table_file.text(result))
    return 0
