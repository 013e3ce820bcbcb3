"""`suite runs`: list, delete and prune runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.cli.options import AsJson, Results, find_run, print_json, print_table
from suite.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from suite.housekeeping import RunSize

Names = Annotated[list[str], typer.Argument(metavar="RUN...", help="names of runs in DIR/runs, or their paths")]

app = typer.Typer(
    invoke_without_command=True,
    help="List the runs of a results folder, delete runs, and remove old checkpoints.\n\nExample: suite runs",
)


@app.callback()
def runs(context: typer.Context, results: Results = Path("results"), as_json: AsJson = False) -> None:
    """List the runs of a results folder: state, size, checkpoints, and the grids that list them.

    Example: suite runs --results results
    """
    if context.invoked_subcommand is not None:
        return
    from suite.housekeeping import list_runs

    listed = list_runs(results)
    if as_json:
        print_json({"results": str(results), "runs": [asdict(run) for run in listed]})
    else:
        print_table(_table(listed))


@app.command()
def delete(names: Names, results: Results = Path("results"), as_json: AsJson = False) -> None:
    """Delete runs with all of their records.

    Example: suite runs delete dense-w32-s0-0a1b2c3d
    """
    from suite.housekeeping import delete_run
    from suite.records import RunDir

    chosen = [RunDir(find_run(name, results)) for name in names]
    _print_freed({run.name: delete_run(run, run.path.parent.parent) for run in chosen}, "deleted", as_json)


@app.command()
def prune(
    names: Names,
    keep: Annotated[
        int, typer.Option(min=0, help="checkpoints that stay; with 0 a run can no longer be scored or exported")
    ] = 1,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Remove the older checkpoints of trained runs. Their records stay.

    Example: suite runs prune dense-w32-s0-0a1b2c3d
    """
    from suite.housekeeping import prune_checkpoints
    from suite.records import RunDir

    chosen = [RunDir(find_run(name, results)) for name in names]
    for run in chosen:
        if (damage := run.damage()) is not None:
            raise UserError(damage)
    _print_freed({run.name: prune_checkpoints(run, keep) for run in chosen}, "pruned", as_json)


def _print_freed(freed: dict[str, int], done: str, as_json: bool) -> None:
    if as_json:
        print_json({done: freed})
    else:
        print("\n".join(f"{done}: {run}, {size / 1e6:,.1f} MB" for run, size in freed.items()))


def _table(listed: list[RunSize]) -> Table:
    from rich.table import Table

    total = sum(run.size for run in listed)
    table = Table(title=f"{len(listed)} runs, {total / 1e9:,.2f} GB", title_justify="left")
    for name in ("run", "state", "MB", "checkpoints", "MB of these", "changed", "grids"):
        table.add_column(name, justify="right" if "MB" in name or name == "checkpoints" else "left")
    for run in listed:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        sizes = f"{run.size / 1e6:,.1f}", str(run.checkpoints), f"{run.checkpoint_bytes / 1e6:,.1f}"
        table.add_row(run.run, run.state, *sizes, changed, ", ".join(run.grids) or "none")
    return table
