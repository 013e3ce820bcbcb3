"""`suite sweep` and `suite cancel`: a grid's cells as processes of this machine, or as jobs of a cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.cli.options import (
    AsJson,
    Baselines,
    DataRoot,
    GridName,
    Overrides,
    Results,
    RunCodeOption,
    Scales,
    check_folders,
    complain_of_failures,
    console,
    load,
    print_json,
    print_statuses,
    print_table,
    scoring_of,
)
from suite.errors import UserError

if TYPE_CHECKING:
    from suite.grids import Grid
    from suite.launch.progress import BarWatcher, PlainWatcher
    from suite.launch.slurm.profile import Profile
    from suite.launch.status import CellStatus
    from suite.launch.worker import Scoring


def sweep(
    grid: GridName,
    jobs: Annotated[int | None, typer.Option(min=1, help="cells at once; default: as cores or GPUs allow")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cells and do nothing")] = False,
    data_root: DataRoot = None,
    run_code: RunCodeOption = None,
    results: Results = Path("results"),
    set_: Overrides = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="let failed cells go on, too")] = False,
    rerun_stale: Annotated[
        bool, typer.Option("--rerun-stale", help="set runs made by other code aside and train again")
    ] = False,
    report: Annotated[bool, typer.Option(help="fit and draw at the end")] = True,
    executor: Annotated[str, typer.Option(help="local: processes of this machine; slurm: jobs of a cluster")] = "local",
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="slurm: a name in clusters/ (default: default), or a .yaml file")
    ] = None,
    wait: Annotated[bool, typer.Option(help="slurm: watch until all is done; Ctrl-C leaves the jobs alone")] = True,
    scale: Scales = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate what a grid is missing, then fit and draw.

    Cells that are done are skipped, cells that were cut go on from their last checkpoint, and Ctrl-C loses
    nothing: give the same command again.

    With --executor slurm the cells become jobs of a cluster (docs/cluster.md); --dry-run then writes their scripts.

    Example: suite sweep laptop --jobs 2
    """
    from suite.launch import progress
    from suite.launch.sweep import refuse_unknown_tasks

    on_slurm = _is_on_slurm(executor, jobs, profile, wait)
    loaded = load(grid, set_, scale, baseline, need_data=not (dry_run and on_slurm))
    cluster = _profile(profile, loaded) if on_slurm else None
    check_folders(results, data_root, make=not dry_run)
    scoring = scoring_of(data_root, run_code, here=not on_slurm and not dry_run)
    if dry_run:
        refuse_unknown_tasks(loaded)
        if cluster is not None:
            _print_scripts(loaded, results, cluster, scoring, report, as_json)
        else:
            _print_dry_run(loaded, results, as_json)
        return
    reported = True
    with progress.watcher(console()) as watcher:
        _make_ready(loaded, results, scoring, retry_failed, rerun_stale, watcher)
        if cluster is not None:
            statuses, reported = _sweep_on_slurm(loaded, results, cluster, scoring, report, wait, watcher)
        else:
            statuses = _sweep_here(loaded, results, jobs, scoring, watcher)
    print_statuses(loaded, statuses, as_json)
    if report and not on_slurm:
        reported = _report(loaded, results, as_json)
    complain_of_failures(statuses)
    states = {status.state for status in statuses}
    if "failed" in states or (wait and not (reported and states <= {"done"})):
        raise typer.Exit(1)


def _is_on_slurm(executor: str, jobs: int | None, profile: str | None, wait: bool) -> bool:
    """Whether cells become jobs of a cluster. Raises UserError for an option of the other executor."""
    if executor not in ("local", "slurm"):
        raise UserError(f"--executor: got {executor!r}, allowed: local, slurm")
    if executor == "slurm":
        if jobs is not None:
            raise UserError(f"--jobs: got {jobs} with --executor slurm, allowed: max_jobs in the profile")
        return True
    if profile is not None:
        raise UserError(f"--profile: got {profile!r} with --executor local, allowed: with --executor slurm")
    if not wait:
        raise UserError("--no-wait: got it with --executor local, allowed: with --executor slurm")
    return False


def _profile(name: str | None, grid: Grid) -> Profile:
    from suite.launch.slurm.profile import load_profile

    return load_profile(name, grid.launch)


def _make_ready(
    grid: Grid,
    results: Path,
    scoring: Scoring,
    retry_failed: bool,
    rerun_stale: bool,
    watcher: BarWatcher | PlainWatcher,
) -> None:
    """What is decided before a sweep starts anything."""
    from suite.launch import sweep as launch

    if rerun_stale:
        for path in launch.set_stale_aside(results, grid.cells):
            watcher.event(f"set aside: {path}")
    launch.refuse_stale(results, grid.cells)
    if retry_failed:
        launch.retry_failed(results, grid.cells)
    launch.refuse_unfit_tasks(grid, results, scoring)


def _sweep_here(
    grid: Grid, results: Path, jobs: int | None, scoring: Scoring, watcher: BarWatcher | PlainWatcher
) -> list[CellStatus]:
    import torch

    from suite.launch import sweep as launch

    gpus = torch.cuda.device_count()
    jobs = jobs or launch.default_jobs(grid.cells, gpus)
    # Set here, so that a sweep started in the background of a script can be stopped, too.
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
    scoring: Scoring,
    report: bool,
    wait: bool,
    watcher: BarWatcher | PlainWatcher,
) -> tuple[list[CellStatus], bool]:
    """How the cells stand in the end, and whether the report did not fail."""
    from suite.launch.slurm import queue
    from suite.launch.slurm.sweep import SlurmSweep
    from suite.launch.status import grid_status, run_dir

    launched = SlurmSweep(grid, results, profile, scoring, watcher, report)
    launched.submit()
    if wait:
        try:
            return launched.watch(), launched.reported
        except KeyboardInterrupt:
            watcher.event("the jobs go on; the same command watches again, `suite cancel` ends them")
            raise typer.Exit(130) from None
    runs = [run_dir(results, cell) for cell in grid.cells]
    return queue.with_slurm(grid_status(results, grid), runs), True


def cancel(
    grid: GridName,
    results: Results = Path("results"),
    set_: Overrides = None,
    scale: Scales = None,
    baseline: Baselines = None,
    as_json: AsJson = False,
) -> None:
    """Cancel the Slurm jobs of a grid's cells; what they have saved stays, and a sweep resumes it.

    Example: suite cancel paper-fixed-memory
    """
    from suite.launch.slurm import sweep

    loaded = load(grid, set_, scale, baseline, need_data=False)
    cancelled = sweep.cancel(results, loaded)
    if as_json:
        print_json({"grid": loaded.name, "cancelled": cancelled})
    else:
        print("\n".join(f"cancelled: {name}" for name in cancelled) or f"no job of {loaded.name} is in Slurm")


def _report(grid: Grid, results: Path, as_json: bool) -> bool:
    """Fit and draw, in a process of its own: analysis never loads torch."""
    command = [sys.executable, "-m", "analysis", "report", "--grid", grid.name, "--results", str(results)]
    done = subprocess.run(command, stdout=sys.stderr if as_json else None)
    if done.returncode:
        print(f"suite: the report failed; again: {' '.join(command)}", file=sys.stderr)
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


def _print_scripts(grid: Grid, results: Path, profile: Profile, scoring: Scoring, report: bool, as_json: bool) -> None:
    from suite.launch.slurm.sweep import dry_run

    scripts = [str(path) for path in dry_run(grid, results, profile, scoring, report)]
    if as_json:
        print_json({"grid": grid.name, "scripts": scripts})
    else:
        print("\n".join(scripts) or f"{grid.name} needs nothing")
        if scripts:
            print(f"{grid.name}: {len(scripts)} scripts written, nothing submitted", file=sys.stderr)
