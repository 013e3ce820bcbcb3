"""`suite train`: one cell in this process, or in the processes of torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.cli.options import (
    AsJson,
    Baselines,
    DataRoot,
    Results,
    RunCodeOption,
    check_folders,
    make_scoring,
    print_one,
)
from suite.errors import UserError

if TYPE_CHECKING:
    from suite.grids import Grid
    from suite.launch.scorer import Scorer
    from suite.launch.worker import Outcome
    from suite.train.parallel import World


def train(
    cell: Annotated[Path, typer.Argument(metavar="CELL", help="a cell.json, or a YAML file with the fields of a cell")],
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    results: Results = Path("results"),
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate one cell in this process, resuming from its last checkpoint.

    A finished run whose last checkpoint is damaged or missing is trained to its end again from an older one.

    Several processes train a cell together under torchrun: torchrun --nproc-per-node 2 -m suite train CELL
    (docs/schedulers.md).

    Example: suite train results/runs/dense-w32-s0-0a1b2c3d/cell.json
    """
    from suite.grids import Grid, load_cell
    from suite.launch.interruption import Interruption
    from suite.launch.worker import run_cell, run_cell_together
    from suite.records import run_dir

    loaded = load_cell(cell, baseline or ())
    check_folders(results, data_root)
    scoring = make_scoring(data_root, run_code)
    grid, path = Grid(loaded.run_name, cell, (loaded,)), run_dir(results, loaded).path
    interruption = Interruption()
    with interruption.on_signals():
        try:
            if "WORLD_SIZE" in os.environ:
                from suite.train.parallel import process_group

                with process_group() as world:
                    _make_ready_together(grid, results, scoring, world)
                    outcome = run_cell_together(path, world, scoring, interruption)
                is_first = world.is_first
            else:
                _make_ready(grid, results, scoring)
                outcome, is_first = run_cell(path, scoring, interruption), True
        except KeyboardInterrupt:
            print("suite: stopped; the same command resumes", file=sys.stderr)
            raise typer.Exit(130) from None
    _report(grid, results, outcome, as_json if is_first else None)


def _make_ready(grid: Grid, results: Path, scorer: Scorer, fits: bool | None = None) -> None:
    """Refuse what cannot be trained, and write what the worker reads; `fits`: whether it fits in memory, if known."""
    from suite.launch import preparation
    from suite.launch.checks import cells
    from suite.launch.checks.memory import MemoryCheck
    from suite.records import Locked

    preparation.refuse_stale(results, grid.cells)
    preparation.retry_failed(results, grid.cells)
    cells.refuse_unfit_cells(grid, results, scorer)
    cells.refuse_missing_parents(grid, results)
    cells.refuse_missing_sources(grid, results)
    if fits is None and (reason := MemoryCheck.of_this_machine().problem(grid.cells[0])) is not None:
        raise UserError(f"{grid.source}: {reason}")
    try:
        run = preparation.prepare(results, grid.cells[0], lambda text: print(text, file=sys.stderr))
        with run.lock():
            preparation.train_lost_end_again(run)
    except Locked as error:
        raise UserError(f"{error}; wait for it or stop it") from None


def _make_ready_together(grid: Grid, results: Path, scorer: Scorer, world: World) -> None:
    """Do `_make_ready` in the first process; if it refuses the cell, the others end without a message."""
    refused: UserError | None = None
    if world.is_first:
        try:
            _make_ready(grid, results, scorer, fits=True)  # several processes divide the cell
        except UserError as error:
            refused = error
    if world.any(refused is not None):
        raise refused or typer.Exit(2)


def _report(grid: Grid, results: Path, outcome: Outcome, as_json: bool | None) -> None:
    """Print the status of the cell; if `as_json` is None, another process prints it and this one only exits."""
    if as_json is not None:
        print_one(grid, results, as_json)
    elif outcome != "done":
        raise typer.Exit(1)
