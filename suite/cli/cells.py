"""`suite cells`: the cells of a grid by number, and as files for other schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suite.cli.options import GridName, GridOptions, expand_options, print_json, print_table
from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.cells import Cell
    from suite.grids import Grid


@expand_options
def cells(
    grid: GridName,
    options: GridOptions,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="write one file per cell there")] = None,
) -> None:
    """List the cells of a grid by number, from 1; with --to, write the file of each for `suite train`.

    The numbers are those of `suite sweep GRID --cell N`. docs/schedulers.md shows both in job arrays.

    Example: suite cells laptop --to cells
    """
    from suite.cells import variants

    loaded = options.load(grid)
    files = [None] * len(loaded.cells) if to is None else write_cells(loaded, to)
    variant = variants(loaded.cells)
    entries = [
        {
            "number": number,
            "cell": cell.hash8,
            "run": cell.run_name,
            "variant": variant[cell.run_name],
            "file": None if file is None else str(file),
        }
        for number, (cell, file) in enumerate(zip(loaded.cells, files, strict=True), start=1)
    ]
    if options.as_json:
        print_json({"grid": loaded.name, "cells": entries})
    else:
        print_table(_table(loaded.name, entries))


def cell_named(grid: Grid, name: str) -> Cell:
    """Return the cell of a grid by its number, from 1, or its run name. Raises UserError."""
    by_name = {cell.run_name: cell for cell in grid.cells}
    by_name |= {str(number): cell for number, cell in enumerate(grid.cells, start=1)}
    if name not in by_name:
        count = len(grid.cells)
        raise UserError(f"--cell: got {name!r}, allowed: 1 to {count}, or a run name (suite cells {grid.source})")
    return by_name[name]


def write_cells(grid: Grid, folder: Path) -> list[Path]:
    """Write each cell as NUMBER-RUN.json, and the sources of external baselines; returns the files of the cells.

    Raises UserError if the folder cannot be written, or for two baselines of different files.
    """
    from suite.atomic import write_json, write_text
    from suite.models import registry

    sources = {registry.family(cell.model.family).path for cell in grid.cells if cell.baseline is not None}
    if len(sources) > 1:
        raise UserError(f"--to: the cells use {len(sources)} baseline files, allowed: one; give suite train --baseline")
    width = len(str(len(grid.cells)))
    paths = [folder / f"{number:0{width}}-{cell.run_name}.json" for number, cell in enumerate(grid.cells, start=1)]
    try:
        for path, cell in zip(paths, grid.cells, strict=True):
            write_json(path, {"cell": cell.model_dump(mode="json"), "hash": cell.hash8, "run": cell.run_name})
        for source in sources:
            if source is not None:
                write_text(folder / "baseline.py", source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--to: {folder} cannot be written ({error.strerror})") from None
    return paths


def _table(name: str, entries: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from suite.cells import display_name

    table = Table("number", "run", "file", title=f"{name}: {len(entries)} cells", title_justify="left")
    for entry in entries:
        table.add_row(str(entry["number"]), escape(display_name(entry["run"], entry["variant"])), entry["file"] or "")
    return table
