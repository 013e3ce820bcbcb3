"""`suite sweep` and `suite cancel`: run the cells of a grid as processes on this machine or as Slurm jobs."""

from __future__ import annotations

import signal
import subprocess
import sys
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
from suite.errors import UserError

if TYPE_CHECKING:
    from suite.grids import Grid
    from suite.launch.progress import BarWatcher, PlainWatcher
    from suite.launch.scorer import Scorer
    from suite.launch.slurm.profile import Profile
    from suite.launch.status import CellStatus


@expand_options
def sweep(
    grid: GridName,
    options: GridOptions,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="cells to run at once; default: as many as cores or GPUs allow")
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
    give the same command again.

    With --executor slurm the cells become jobs on a cluster (docs/cluster.md); --dry-run then writes their scripts.

    Example: suite sweep laptop --jobs 2
    """
    from suite.launch import progress
    from suite.launch.sweep import refuse_unknown_tasks

    on_slurm = _is_on_slurm(executor, jobs, profile, wait)
    loaded = options.load(grid, need_data=not (dry_run and on_slurm))
    cluster = _profile(profile, loaded) if on_slurm else None
    results = options.results
    check_folders(results, data_root, make=not dry_run)
    scoring = make_scoring(data_root, run_code, here=not on_slurm and not dry_run)
    if dry_run:
        refuse_unknown_tasks(loaded)
        if cluster is not None:
            _print_scripts(loaded, results, cluster, scoring, report, options.as_json)
        else:
            _print_dry_run(loaded, results, options.as_json)
        return
    reported = True
    with progress.watcher(stderr_console()) as watcher:
        _make_ready(loaded, results, scoring, retry_failed, rerun_stale, watcher)
        if cluster is not None:
            statuses, reported = _sweep_on_slurm(loaded, results, cluster, scoring, report, wait, watcher)
        else:
            statuses = _sweep_here(loaded, results, jobs, scoring, watcher)
    print_statuses(loaded, statuses, options.as_json)
    if report and not on_slurm:
        reported = _report(loaded, results, options.as_json)
    report_failures(statuses)
    states = {status.state for status in statuses}
    if "failed" in states or (wait and not (reported and states <= {"done"})):
        raise typer.Exit(1)


def _is_on_slurm(executor: str, jobs: int | None, profile: str | None, wait: bool) -> bool:
    """Whether the cells become Slurm jobs. Raises UserError for an option that belongs to the other executor."""
    if executor not in ("local", "slurm"):
        raise UserError(f"--executor: got {executor!r}, allowed: local, slurm")
    if executor == "slurm":
        if jobs is not None:
            raise UserError("--jobs: applies to --executor local; on Slurm, set max_jobs in the profile")
        return True
    if profile is not None:
        raise UserError("--profile: applies to --executor slurm")
    if not wait:
        raise UserError("--no-wait: applies to --executor slurm")
    return False


def _profile(name: str | None, grid: Grid) -> Profile:
    from suite.launch.slurm.profile import load_profile

    return load_profile(name, grid.launch)


def _make_ready(
    grid: Grid,
    results: Path,
    scoring: Scorer,
    retry_failed: bool,
    rerun_stale: bool,
    watcher: BarWatcher | PlainWatcher,
) -> None:
    """Archive or refuse stale runs, release failed cells, and refuse tasks that cannot be scored."""
    from suite.launch import sweep as launch

    if rerun_stale:
        for path in launch.set_stale_aside(results, grid.cells):
            watcher.event(f"archived: {path}")
    launch.refuse_stale(results, grid.cells)
    if retry_failed:
        launch.retry_failed(results, grid.cells)
    launch.refuse_unfit_tasks(grid, results, scoring)


def _sweep_here(
    grid: Grid, results: Path, jobs: int | None, scoring: Scorer, watcher: BarWatcher | PlainWatcher
) -> list[CellStatus]:
    import torch

    from suite.launch import sweep as launch

    gpus = torch.cuda.device_count()
    jobs = jobs or launch.default_jobs(grid.cells, gpus)
    # A shell starts background jobs with SIGINT ignored; this lets them be interrupted, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return launch.Sweep(grid, results, jobs, scoring, watcher, gpus).run()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _sweep_on_slurm(
    grid: Grid,
    results: Path,
    profile: Profile,
    scoring: Scorer,
    report: bool,
    wait: bool,
    watcher: BarWatcher | PlainWatcher,
) -> tuple[list[CellStatus], bool]:
    """Return the final status of the cells, and whether the report succeeded."""
    from suite.launch.slurm import queue
    from suite.launch.slurm.sweep import SlurmSweep
    from suite.launch.status import grid_status
    from suite.records import run_dir

    launched = SlurmSweep(grid, results, profile, scoring, watcher, report)
    launched.submit()
    if wait:
        try:
            return launched.watch(), launched.reported
        except KeyboardInterrupt:
            watcher.event("the jobs keep running; the same command watches them again, `suite cancel` ends them")
            raise typer.Exit(130) from None
    runs = [run_dir(results, cell) for cell in grid.cells]
    return queue.with_slurm(grid_status(results, grid), runs), True


@expand_options
def cancel(grid: GridName, options: GridOptions) -> None:
    """Cancel the Slurm jobs of a grid's cells; their checkpoints stay, and a later sweep resumes from them.

    Example: suite cancel paper-fixed-memory
    """
    from suite.launch.slurm import sweep

    loaded = options.load(grid, need_data=False)
    cancelled = sweep.cancel(options.results, loaded)
    if options.as_json:
        print_json({"grid": loaded.name, "cancelled": cancelled})
    else:
        print("\n".join(f"cancelled: {name}" for name in cancelled) or f"{loaded.name} has no jobs in Slurm")


def _report(grid: Grid, results: Path, as_json: bool) -> bool:
    """Fit and draw in another process, because analysis is independent of torch and suite."""
    command = [sys.executable, "-m", "analysis", "report", "--grid", grid.name, "--results", str(results)]
    done = subprocess.run(command, stdout=sys.stderr if as_json else None)
    if done.returncode:
        print(f"suite: the report failed; to repeat it: {' '.join(command)}", file=sys.stderr)
    return done.returncode == 0


def _print_dry_run(grid: Grid, results: Path, as_json: bool) -> None:
    from suite.launch.status import grid_status, status_json, table

    statuses = grid_status(results, grid)
    if as_json:
        document = status_json(grid, statuses)
        for entry, cell in zip(document["cells"], grid.cells, strict=True):
            entry["config"] = cell.model_dump(mode="json")
        print_json(document)
    else:
        print_table(table(grid, statuses))


def _print_scripts(grid: Grid, results: Path, profile: Profile, scoring: Scorer, report: bool, as_json: bool) -> None:
    from suite.launch.slurm.sweep import dry_run

    scripts = [str(path) for path in dry_run(grid, results, profile, scoring, report)]
    if as_json:
        print_json({"grid": grid.name, "scripts": scripts})
    else:
        print("\n".join(scripts) or f"{grid.name}: every cell is done")
        if scripts:
            print(f"{grid.name}: {len(scripts)} scripts written, nothing submitted", file=sys.stderr)
