"""The verb `next`: where the next parameter goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli.options import REFERENCE, AsJson, Grid, Reference, Results, print_json
from analysis.errors import InputError

EXAMPLE = "Example: python -m analysis next --grid laptop --by bytes --figure figures/laptop"


def next_parameter(
    results: Results = Path("results"),
    grid: Grid = None,
    reference: Reference = None,
    by: Annotated[str, typer.Option(metavar="params|held|bytes|macs|time|sparsity", help="the cost")] = "params",
    metric: Annotated[
        str | None, typer.Option(help="e50, or TASK/METRIC of a final score; default: that of the grid's contrast")
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="DIR", help="draw the gains there: PNG, PDF, SVG")] = None,
    as_json: AsJson = False,
) -> int:
    """Print the gain of each destination of the next parameter, per doubling of its cost, and which gains most."""
    from analysis.comparisons.destinations.next_parameter import AXES, metric_of, steps
    from analysis.records.grid_data import load
    from analysis.report.blocks import to_markdown
    from analysis.report.next_parameter import document, next_blocks

    if by not in AXES:
        raise InputError(f"--by: got {by!r}, allowed: {', '.join(AXES)}")
    data = load(results, grid, reference, fallback=REFERENCE)
    chosen = metric_of(data, metric)
    measured = steps(data, chosen)
    if not measured:
        raise InputError(f"no variant has a plain {data.reference} run of the same base, data and seed")
    files: list[Path] = []
    if figure is not None:
        from analysis.figures.next_parameter import draw

        files = draw(data, measured, chosen, f"Source: our runs, {data.grid or results}.", figure)
    if as_json:
        print_json(document(data, measured, chosen, by) | {"figure": [str(path) for path in files]})
    else:
        print(to_markdown(next_blocks(data, measured, chosen, by), Path()), end="")
        for path in files[:1]:
            print(path)
    return 0
