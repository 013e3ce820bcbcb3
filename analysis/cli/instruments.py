"""The verb `instruments`: which measurement of the same runs has the least noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.options import REFERENCE, AsJson, Grid, Results, print_json

EXAMPLE = "Example: python -m analysis instruments --grid instruments --csv instruments.csv"


def instruments(
    results: Results = Path("results"),
    grid: Grid = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="write every measurement there")] = None,
    as_json: AsJson = False,
) -> int:
    """Compare raw probes, probes of averaged weights and annealed branches of the same runs: noise and order."""
    from analysis.comparisons.choosing.instruments import document, measurements
    from analysis.records.grid_data import load
    from analysis.records.writing import replacing
    from analysis.report.blocks import to_markdown
    from analysis.report.instruments import instrument_blocks

    table = measurements(load(results, grid, fallback=REFERENCE))
    if csv is not None:
        with replacing(csv, "--csv") as temporary:
            table.to_csv(temporary, index=False)
    if as_json:
        print_json(document(table))
    else:
        print(to_markdown(instrument_blocks(table), Path()), end="")
    return 0
