"""Whether the cells of a grid can be trained and scored as they are configured, from the configuration alone."""

from __future__ import annotations

from pathlib import Path

from suite.errors import UserError
from suite.grids import Grid
from suite.launch.checks.settings import refuse_unfit_settings
from suite.launch.scorer import Scorer, is_finished
from suite.launch.scoring import refuse_too_many_examples, refuse_unfit
from suite.records import run_dir
from suite.train.checkpoint import steps_saved
from suite.train.finetuning.parent import find_parent
from suite.train.reporting.loggers import require_packages
from suite.yaml_input import did_you_mean


def refuse_unfit_cells(grid: Grid, results: Path, scorer: Scorer) -> None:
    """Raise UserError if a cell that is not finished has tasks or settings that cannot work, before anything trains.

    Args:
        grid: The grid.
        results: The results folder.
        scorer: Settings for scoring.
    """
    seen: set[tuple[str, str]] = set()
    for cell in grid.cells:
        run = run_dir(results, cell)
        if is_finished(run, cell):
            continue
        try:
            require_packages(cell.train.loggers)
            if not run.state().get("trained"):
                refuse_unfit_settings(cell)
            refuse_unfit(run, cell, scorer)
            refuse_too_many_examples(run, cell, scorer.data_root, seen)
        except UserError as error:
            raise UserError(f"{grid.source}: {error}") from None


def refuse_unfit_evaluations(grid: Grid, results: Path) -> None:
    """Raise UserError if a task does not exist, or a cell's data has fewer examples than its missing scores need.

    The settings of the machine that scores, such as a folder of evaluation data, are not known.

    Args:
        grid: The grid.
        results: The results folder.
    """
    refuse_unknown_tasks(grid)
    seen: set[tuple[str, str]] = set()
    for cell in grid.cells:
        try:
            refuse_too_many_examples(run_dir(results, cell), cell, None, seen)
        except UserError as error:
            raise UserError(f"{grid.source}: {error}") from None


def refuse_missing_parents(grid: Grid, results: Path) -> None:
    """Raise UserError if a cell that is not finished starts from a run that neither exists nor is in the grid."""
    present = {None, *(cell.hash8 for cell in grid.cells)}
    for cell in grid.cells:
        run = run_dir(results, cell)
        if cell.train.parent in present or steps_saved(run) or is_finished(run, cell):
            continue
        try:
            find_parent(run, cell)
        except UserError as error:
            raise UserError(f"{grid.source}: {error}") from None


def refuse_missing_sources(grid: Grid, results: Path) -> None:
    """Raise UserError if a cell with smaller tables is not finished, and its source is neither trained nor in the
    grid."""
    present = {cell.hash8 for cell in grid.cells}
    for cell in grid.cells:
        run = run_dir(results, cell)
        if cell.source is None or cell.source.hash8 in present or is_finished(run, cell):
            continue
        field = "kept_rows" if cell.quantised is None else "quantised"
        if not run_dir(results, cell.source).state().get("trained"):
            raise UserError(
                f"{grid.source}: {field}: got {getattr(cell, field)!r} without the trained run {cell.source.run_name}; "
                f"add null to the values of {field}, or train that run"
            )


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
