"""Before a sweep starts anything: what it refuses, archives and writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from suite.atomic import write_json
from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.provenance import stale_because
from suite.launch.scorer import Scorer, is_finished
from suite.launch.worker import CELL_FACTS, refuse_unfit
from suite.records import GRIDS, DamagedRecord, Locked, RunDir, run_dir
from suite.train.loggers import require_packages
from suite.yaml_input import did_you_mean


def write_grid(results: Path, grid: Grid) -> None:
    """Write results/grids/<grid>/grid.json: the runs of the grid, and its primary contrast."""
    content = {
        "grid": grid.name,
        "source": str(grid.source),
        "runs": [cell.run_name for cell in grid.cells],
        "contrast": grid.contrast.document() if grid.contrast else None,
    }
    write_json(results / GRIDS / grid.name / "grid.json", content)


def prepare(results: Path, cell: Cell) -> RunDir:
    """Write what a worker reads into the cell's run directory; evaluations that other grids added to it stay.

    Raises Locked if another process has the run, and DamagedRecord rather than overwriting a damaged record.
    """
    run = run_dir(results, cell)
    with run.lock(patience_s=0.2):
        if (damage := run.damage()) is not None:
            raise DamagedRecord(damage)
        facts: dict[str, Any] = {}
        if run.cell_path.exists() and stale_because(run, cell) is None:
            record = run.read_record()
            facts = {name: value for name, value in record.items() if name not in CELL_FACTS}
            cell = run.read_cell().with_evaluations(cell.evaluate)
        run.write_cell(cell, **facts)
    return run


def refuse_unfit_tasks(grid: Grid, results: Path, scorer: Scorer) -> None:
    """Raise UserError if a cell that is not finished has a task that does not fit its data, before anything trains."""
    for cell in grid.cells:
        run = run_dir(results, cell)
        if is_finished(run, cell):
            continue
        try:
            require_packages(cell.train.loggers)
            refuse_unfit(run, cell, scorer)
        except UserError as error:
            raise UserError(f"{grid.source}: {error}") from None


def refuse_unknown_tasks(grid: Grid) -> None:
    """Raise UserError for a task that does not exist."""
    from suite.evaluate import task_list

    names = task_list.names()
    for name in dict.fromkeys(task for cell in grid.cells for config in cell.evaluate for task in config.tasks):
        if name not in names:
            allowed = ", ".join(names)
            raise UserError(
                f"{grid.source}: evaluate.tasks: got {name!r}{did_you_mean(name, names)}, allowed: {allowed}"
            )


def refuse_stale(results: Path, cells: Iterable[Cell]) -> None:
    """Raise UserError if runs on disk were made by other code: they are never reused silently."""
    stale = {}
    for cell in cells:
        run = run_dir(results, cell)
        reason = stale_because(run, cell)
        if reason is not None:
            stale[run.path] = reason
    if stale:
        path, reason = next(iter(stale.items()))
        others = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise UserError(
            f"{path}{others}: stale: {reason}; use --rerun-stale (archives such runs in {results / 'stale'} and trains "
            "them again), another --results, or the code that made them"
        )


def archive_stale(results: Path, cells: Iterable[Cell]) -> list[Path]:
    """Move stale runs to results/stale; returns their new places. Raises UserError if one of them is locked."""
    moved = []
    for cell in cells:
        run = run_dir(results, cell)
        if stale_because(run, cell) is None:
            continue
        try:
            with run.lock():
                target = _free_path(results / "stale" / run.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                moved.append(run.path.rename(target))
        except Locked:
            raise UserError(f"{run.path}: is locked by another process; wait for it or stop it") from None
    return moved


def retry_failed(results: Path, cells: Iterable[Cell]) -> None:
    """Make failed runs pending, so that they resume from their last checkpoint; damaged ones are left alone."""
    for cell in cells:
        run = run_dir(results, cell)
        if run.damage() is None and run.state()["state"] == "failed":
            with run.lock():
                run.set_state("pending")


def _free_path(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3 ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(candidate for candidate in numbered if not candidate.exists())
