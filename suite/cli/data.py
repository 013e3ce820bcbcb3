"""`suite data`: tokenize training corpora and download evaluation data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from suite.cli.options import (
    AsJson,
    Baselines,
    Overrides,
    Results,
    TaskNames,
    parse_overrides,
    parse_tasks,
    print_json,
    print_table,
    stderr_console,
)
from suite.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Prepare training corpora and evaluation data.")


@app.command()
def prepare(
    grid: Annotated[str, typer.Argument(metavar="GRID|CELL", help="a grid, or the file of a cell")],
    results: Results = Path("results"),
    set_: Overrides = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize the data of a grid's cells, each corpus once, into DIR/cache.

    If it is interrupted, the same command resumes.

    Example: suite data prepare factbook --set data.path=corpus/
    """
    from suite.data.preparing import prepare_all, table
    from suite.grids import load_grid_or_cell

    loaded = load_grid_or_cell(grid, parse_overrides(set_), baseline or ())
    try:
        reports = prepare_all({cell.run_name: cell.data for cell in loaded.cells}, results / "cache", stderr_console())
    except KeyboardInterrupt:
        print("suite: interrupted; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"grid": loaded.name, "corpora": reports})
    else:
        print_table(table(reports))


@app.command()
def prefetch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder to give as --data-root")],
    tasks: TaskNames = None,
    as_json: AsJson = False,
) -> None:
    """Download the evaluation data that tasks read and DIR lacks, for machines without a network.

    Example: suite data prefetch data/eval --tasks nq_open,mmlu
    """
    from suite.evaluate.prefetch import prefetch

    if folder.exists() and not folder.is_dir():
        raise UserError(f"DIR: {folder} is a file; give a folder")
    written = [str(path) for path in prefetch(folder, parse_tasks(tasks))]
    if as_json:
        print_json({"folder": str(folder), "written": written})
    else:
        print("\n".join(written) or f"{folder} is complete")
