"""`suite sweep` and `suite cancel`: run the cells of a grid as processes on this machine or as Slurm jobs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.cli.options import (
    DataRoot,
    GridName,
    GridOptions,
    RunCodeOption,
    check_folders,
    expand_options,
    make_scoring,
    print_json,
    print_statuses,
    print_table,
    report_failures,
    stderr_console,
)

if TYPE_CHECKING:
    from suite.cells import Cell
    from suite.grids import Grid
    from suite.launch.executor import Executor
    from suite.launch.progress import BarWatcher, PlainWatcher
    from suite.launch.status import CellStatus
    from suite.launch.sweep import Sweep


@expand_options
def sweep(
    grid: GridName,
    options: GridOptions,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="cells to run at once; default: as many as cores or GPUs allow")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="use N GPUs of this machine, and as many for a cell as it needs; default: all, one for each cell",
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            "--cell", metavar="N|RUN", help="only this cell, by its number or run name (suite cells GRID); no report"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cells and start nothing")] = False,
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="start failed cells again")] = False,
    rerun_stale: Annotated[
        bool, typer.Option("--rerun-stale", help="archive runs made by other code and train their cells again")
    ] = False,
    report: Annotated[bool, typer.Option(help="fit and draw when the cells are done")] = True,
    executor: Annotated[str, typer.Option(help="local: processes on this machine; slurm: jobs on a cluster")] = "local",
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="slurm: a profile in clusters/ (default: default), or a .yaml file"),
    ] = None,
    wait: Annotated[bool, typer.Option(help="slurm: watch the jobs until they end; Ctrl-C leaves them running")] = True,
) -> None:
    """Train and evaluate the cells of a grid that are not done, then fit and draw.

    Cells that are done are skipped, and interrupted cells resume from their last checkpoint: after Ctrl-C or a crash,
    repeat the same command.

    With --executor slurm the cells become jobs on a cluster (docs/cluster.md); --dry-run then writes their scripts.

    Example: suite sweep laptop --jobs 2
    """
    from suite.cli.cells import cell_named
    from suite.launch import progress
    from suite.launch.checks.cells import (
        refuse_missing_parents,
        refuse_missing_sources,
        refuse_unfit_cells,
        refuse_unknown_tasks,
    )
    from suite.launch.executor import Options, executor_class
    from suite.launch.interruption import Interruption
    from suite.launch.slurm.profile import refuse_unfit_launch
    from suite.launch.status import grid_status
    from suite.launch.sweep import Sweep

    kind, results = executor_class(executor), options.results
    whole = options.load(grid, need_data=not (dry_run and kind.is_queue))
    refuse_unfit_launch(whole.launch, whole.source)
    loaded = whole if cell is None else replace(whole, cells=(cell_named(whole, cell),))
    report = report and cell is None
    check_folders(results, data_root, make=not dry_run)
    scorer = make_scoring(data_root, run_code, here=not kind.is_queue and not dry_run)
    if dry_run:
        statuses = grid_status(results, loaded)
        finished = {status.run for status in statuses if status.is_finished}
        missing = replace(loaded, cells=tuple(cell for cell in loaded.cells if cell.run_name not in finished))
        chosen = kind.create(Options(missing, results, scorer, jobs, gpus, profile, wait, report))
        refuse_unknown_tasks(loaded)
        refuse_unfit_cells(missing, results, scorer)
        _print_dry_run(loaded, statuses, missing.cells, chosen, options.as_json)
        return
    with progress.watcher(stderr_console()) as watcher:
        chosen = kind.create(Options(loaded, results, scorer, jobs, gpus, profile, wait, report, watcher.event))
        _release(loaded, results, retry_failed, rerun_stale, watcher)
        interruption = Interruption()
        launched = Sweep(loaded, results, chosen, watcher, interruption, whole)
        refuse_unfit_cells(replace(loaded, cells=tuple(launched.missing)), results, scorer)
        refuse_missing_parents(loaded, results)
        refuse_missing_sources(loaded, results)
        with interruption.on_signals():
            try:
                statuses = launched.run() if wait else _submitted(launched)
            except KeyboardInterrupt:
                if chosen.is_queue:
                    watcher.event(
                        "the jobs keep running; the same command watches them again, `suite cancel` ends them"
                    )
                raise typer.Exit(130) from None
    print_statuses(loaded, statuses, options.as_json)
    reported = chosen.report(to_stderr=options.as_json) if report and wait else True
    report_failures(statuses)
    states = {status.state for status in statuses}
    if "failed" in states or (wait and not (reported and states <= {"done"})):
        raise typer.Exit(1)


def _submitted(launched: Sweep) -> list[CellStatus]:
    """Submit what is missing without waiting for it."""
    from suite.launch.status import grid_status
    from suite.records import run_dir

    launched.start()
    runs = [run_dir(launched.results, cell) for cell in launched.grid.cells]
    return launched.executor.with_jobs(grid_status(launched.results, launched.grid), runs)


def _release(
    grid: Grid, results: Path, retry_failed: bool, rerun_stale: bool, watcher: BarWatcher | PlainWatcher
) -> None:
    """Archive or refuse stale runs, and release failed cells."""
    from suite.launch import preparation

    if rerun_stale:
        for path in preparation.archive_stale(results, grid.cells):
            watcher.event(f"archived: {path}")
    preparation.refuse_other_file(preparation.grid_path(results, grid), grid)
    preparation.refuse_stale(results, grid.cells)
    if retry_failed:
        preparation.retry_failed(results, grid.cells)


@expand_options
def cancel(grid: GridName, options: GridOptions) -> None:
    """Cancel the jobs of a grid's cells in a queue; their checkpoints stay, and a later sweep resumes from them.

    Example: suite cancel paper-fixed-memory
    """
    from suite.launch.executor import executor_classes

    loaded = options.load(grid, need_data=False)
    cancelled = [name for kind in executor_classes() for name in kind.cancel_grid(options.results, loaded)]
    if options.as_json:
        print_json({"grid": loaded.name, "cancelled": cancelled})
    else:
        print("\n".join(f"cancelled: {name}" for name in cancelled) or f"{loaded.name} has no jobs")


def _print_dry_run(
    grid: Grid, statuses: list[CellStatus], missing: Sequence[Cell], executor: Executor, as_json: bool
) -> None:
    """Print the batch scripts of a queue, or the cells that would be started here; `missing` are not finished."""
    from suite.launch.checks.data import refuse_unusable_data
    from suite.launch.status import status_json, table

    unfit = {cell.run_name: reason for cell in missing if (reason := executor.unfit(cell))}
    if executor.is_queue:
        scripts = [str(path) for path in executor.dry_run([cell for cell in missing if cell.run_name not in unfit])]
        if as_json:
            print_json({"grid": grid.name, "scripts": scripts})
        else:
            print("\n".join(scripts) or f"{grid.name}: {'no cell fits' if unfit else 'every cell is done'}")
            if scripts:
                print(f"{grid.name}: {len(scripts)} scripts written, nothing submitted", file=sys.stderr)
    else:
        refuse_unusable_data(replace(grid, cells=tuple(missing)))
        if as_json:
            document = status_json(grid, statuses)
            for entry, cell in zip(document["cells"], grid.cells, strict=True):
                entry["config"] = cell.model_dump(mode="json")
            print_json(document)
        else:
            print_table(table(grid, statuses))
    for name, reason in unfit.items():
        print(f"would fail: {name}: {reason}", file=sys.stderr)
    if unfit:
        raise typer.Exit(1)
