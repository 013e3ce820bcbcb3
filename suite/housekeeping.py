"""Looking after a results folder: which runs there are, how large, of which grids; deleting runs and checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from suite.errors import UserError
from suite.records import GRIDS, RUNS, DamagedRecord, Locked, RunDir, read_json
from suite.train.checkpoint import newest_whole, steps_saved
from suite.train.schedules import branch_steps


@dataclass(frozen=True)
class RunSize:
    """A run on disk.

    Attributes:
        run: Its name.
        state: Its state; `damaged` if a record file cannot be read; `pending` if the process that ran it was killed.
        size: Bytes of the whole folder.
        checkpoints: Number of checkpoints.
        checkpoint_bytes: Bytes of the checkpoints.
        grids: The grids that list the run; empty if none does.
        changed: When state.json was written last, in seconds since 1970.
    """

    run: str
    state: str
    size: int
    checkpoints: int
    checkpoint_bytes: int
    grids: tuple[str, ...]
    changed: float


def list_runs(results: Path) -> list[RunSize]:
    """Return all runs of a results folder, by name."""
    grids = _grids_of_runs(results)
    paths = sorted(path for path in (results / RUNS).glob("*") if path.is_dir())
    return [_size_of(RunDir(path), tuple(grids.get(path.name, ()))) for path in paths]


def _size_of(run: RunDir, grids: tuple[str, ...]) -> RunSize:
    state = "damaged" if run.damage() is not None else str(run.state()["state"])
    if state == "running" and not run.is_locked():
        state = "pending"  # its process was killed
    changed = run.state_path.stat().st_mtime if run.state_path.exists() else run.path.stat().st_mtime
    saved = steps_saved(run)
    return RunSize(run.name, state, _bytes(run.path), len(saved), _bytes(run.checkpoints), grids, changed)


def _grids_of_runs(results: Path) -> dict[str, list[str]]:
    """Return the names of the grids that list each run; damaged records are left out."""
    grids: dict[str, list[str]] = {}
    for path in sorted((results / GRIDS).glob("*/grid.json")):
        try:
            record = read_json(path, "delete the file")
        except DamagedRecord:
            continue
        for run in record.get("runs", ()):
            grids.setdefault(str(run), []).append(path.parent.name)
    return grids


def delete_run(run: RunDir, results: Path) -> int:
    """Delete a run with all of its records; returns the bytes of its files.

    Raises:
        UserError: Another process holds the run, or another run of the folder started from its weights.
    """
    for other in (results / RUNS).glob("*/cell.json"):
        if other.parent == run.path:
            continue
        try:
            parent = read_json(other, "restore the file").get("parent")
        except DamagedRecord:
            continue
        if (
            isinstance(parent, dict)
            and parent.get("run") == run.name
            and not RunDir(other.parent).state().get("trained")
        ):
            raise UserError(
                f"{run.path}: {other.parent.name}, which is not trained yet, starts from it; delete that first"
            )
    size = _bytes(run.path)
    try:
        with run.lock():
            shutil.rmtree(run.path)
    except Locked:
        raise UserError(f"{run.path}: is locked by another process; wait for it or stop it") from None
    return size


def prune_checkpoints(run: RunDir, retain: int = 1) -> int:
    """Delete the older checkpoints of a trained run; returns the bytes of their files.

    The newest whole ones stay, and those from which other budgets of the same stable phase start.

    Args:
        run: The run.
        retain: Number of checkpoints that stay; 0: none, and the run can no longer be scored or exported.

    Raises:
        UserError: The run is not trained to its end, another process holds it, or no checkpoint is whole.
    """
    if not run.state().get("trained"):
        raise UserError(
            f"{run.path}: is not trained to its end and may resume from its checkpoints; finish it with suite train"
        )
    try:
        with run.lock():
            steps = steps_saved(run)
            newest = newest_whole(run) if retain else None
            whole = [step for step in steps if newest is not None and step <= newest]
            cell = run.read_cell()
            needed = {*whole[len(whole) - retain :], *(branch_steps(cell.train, cell.data.seq_len) if retain else ())}
            freed = 0
            for step in steps:
                if step not in needed:
                    # Renamed first, so that a kill during the removal leaves no incomplete checkpoint.
                    removed = (run.checkpoints / f"step-{step}").rename(run.checkpoints / f".old-{step}")
                    freed += _bytes(removed)
                    shutil.rmtree(removed)
            return freed
    except Locked:
        raise UserError(f"{run.path}: is locked by another process; wait for it or stop it") from None


def _bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; a file that disappears meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
