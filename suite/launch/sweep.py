"""A sweep: find out which cells of a grid are missing, run them a few at a time, and say how they stand.

Nothing is kept in memory that is not on disk: a sweep that is killed is simply started again. Who runs a cell is
decided by the lock of its run, taken by the worker, not by the launcher: two sweeps of one grid, or the orphans
of a killed one, never train a run together; whoever comes second watches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from suite.atomic import write_json
from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch import local
from suite.launch.branches import must_wait
from suite.launch.provenance import stale_because
from suite.launch.scorer import Scorer, is_finished
from suite.launch.status import CellStatus, cell_status, grid_status
from suite.launch.worker import CELL_FACTS, refuse_unfit
from suite.records import GRIDS, Locked, RunDir, run_dir
from suite.train.loggers import require_packages
from suite.yaml_input import did_you_mean

POLL_S = 0.1
TELL_S = 1.0
MAX_STARTS = 3
"""A worker that dies without a word (killed, out of memory) is started again, so often in all."""
STOP_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Standing:
    """A sweep at one moment: cells in all, finished, and (run, progress 0 to 1, seconds to go) of those running."""

    cells: int
    finished: int
    running: list[tuple[str, float, float | None]]


class Watcher(Protocol):
    """Who is told how a sweep goes."""

    def event(self, text: str) -> None:
        """Something happened to a cell."""

    def progress(self, standing: Standing) -> None:
        """How the sweep stands now; called about once a second."""


@dataclass
class _Entry:
    """A cell that is not finished yet."""

    cell: Cell
    run: RunDir
    starts: int = 0
    log: str | None = None


@dataclass
class _Active:
    """A job of ours in one of the slots."""

    entry: _Entry
    job: Any


@dataclass
class Sweep:
    """The window loop over a grid's missing cells; at most `jobs` of them run at once."""

    grid: Grid
    results: Path
    jobs: int
    scoring: Scorer
    watcher: Watcher
    gpus: int = 0
    waiting: list[_Entry] = field(default_factory=list)
    watched: list[_Entry] = field(default_factory=list)
    active: dict[int, _Active] = field(default_factory=dict)

    def run(self) -> list[CellStatus]:
        """Run what is missing to its end and give how every cell stands.

        On KeyboardInterrupt the workers are stopped, everything on disk stays resumable, and it is raised again.
        """
        write_grid(self.results, self.grid)
        for cell in self.grid.cells:
            entry = _Entry(cell, run_dir(self.results, cell))
            if not is_finished(entry.run, entry.cell):
                self.waiting.append(entry)
        finished = len(self.grid.cells) - len(self.waiting)
        if finished:
            self.watcher.event(f"{finished} of {len(self.grid.cells)} cells need nothing")
        told = 0.0
        try:
            while self.waiting or self.watched or self.active:
                self._collect()
                self._start()
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    self.watcher.progress(self._standing())
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._stop()
            raise
        return grid_status(self.results, self.grid)

    def _standing(self) -> Standing:
        entries = [active.entry for active in self.active.values()] + self.watched
        states = [(entry.run.name, entry.run.state()) for entry in entries]
        running = [(name, float(state.get("progress") or 0.0), state.get("eta_s")) for name, state in states]
        total = len(self.grid.cells)
        return Standing(total, total - len(running) - len(self.waiting), running)

    def _collect(self) -> None:
        """Settle the jobs that have ended and the runs others have let go of."""
        for slot, active in list(self.active.items()):
            if active.job.done():
                del self.active[slot]
                self._settle(active.entry)
        for entry in list(self.watched):
            if not entry.run.is_locked():
                self.watched.remove(entry)
                self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        """Decide what a run needs that nobody of ours works on any more."""
        if entry.run.is_locked():
            # Its controller died and left it, or another sweep has it.
            self.watched.append(entry)
        elif is_finished(entry.run, entry.cell):
            status = cell_status(self.results, entry.cell)
            said = status.cause if status.state == "failed" else status.headline
            self.watcher.event(f"{status.state}: {status.run}: {said}")
        elif entry.starts >= MAX_STARTS:
            self._give_up(entry)
        else:
            if entry.starts:
                self.watcher.event(f"cut: {entry.run.name}: its process ended without a word, starting it again")
            self.waiting.insert(0, entry)

    def _give_up(self, entry: _Entry) -> None:
        cause = f"its process ended without a word {entry.starts} times (killed, or out of memory)"
        with entry.run.lock():
            entry.run.set_state("failed", cause=cause, log=entry.log, eta_s=None)
        self.watcher.event(f"failed: {entry.run.name}: {cause}")

    def _start(self) -> None:
        """Fill the free slots."""
        free = [slot for slot in range(self.jobs) if slot not in self.active]
        while free and (entry := self._next()) is not None:
            self.waiting.remove(entry)
            try:
                prepare(self.results, entry.cell)
            except Locked:
                self.watcher.event(f"watching: {entry.run.name}: another process runs it")
                self.watched.append(entry)
                continue
            slot = free.pop(0)
            gpu = slot % self.gpus if self.gpus else None
            job = local.start(entry.run.path, self.scoring, entry.cell.threads, gpu)
            entry.starts += 1
            entry.log = str(job.paths.stdout)
            self.active[slot] = _Active(entry, job)
            self.watcher.event(f"started: {entry.run.name}")

    def _next(self) -> _Entry | None:
        """The first waiting entry that would not train what another is about to have trained."""
        active = [active.entry for active in self.active.values()]
        unfinished = [entry.cell for entry in self.waiting + self.watched + active]
        return next((entry for entry in self.waiting if not must_wait(entry.cell, entry.run, unfinished)), None)

    def _stop(self) -> None:
        """Stop our workers; a run that is cut resumes from its last checkpoint."""
        self.watcher.event("stopping; the same command resumes")
        deadline = time.monotonic() + STOP_PATIENCE_S
        while time.monotonic() < deadline and any(not active.job.done() for active in self.active.values()):
            for active in self.active.values():
                local.stop(active.job)
            time.sleep(TELL_S)


def write_grid(results: Path, grid: Grid) -> None:
    """Write results/grids/<grid>/grid.json: the runs of the grid, and its primary contrast."""
    content = {
        "grid": grid.name,
        "source": str(grid.source),
        "runs": [cell.run_name for cell in grid.cells],
        "contrast": grid.contrast.document() if grid.contrast else None,
    }
    write_json(results / GRIDS / grid.name / "grid.json", content)


def refuse_unfit_tasks(grid: Grid, results: Path, scoring: Scorer) -> None:
    """Raise UserError if a cell that is not finished asks for what its run cannot be asked: said before it trains."""
    for cell in grid.cells:
        run = run_dir(results, cell)
        if is_finished(run, cell):
            continue
        try:
            require_packages(cell.train.loggers)
            refuse_unfit(run, cell, scoring)
        except UserError as error:
            raise UserError(f"{grid.source}: {error}") from None


def refuse_unknown_tasks(grid: Grid) -> None:
    """Raise UserError for a task that nothing can be asked, whatever else a sweep would need."""
    from suite.evaluate import task_list

    known = task_list.names()
    for name in dict.fromkeys(task for cell in grid.cells for config in cell.evaluate for task in config.tasks):
        if name not in known:
            allowed = ", ".join(known)
            raise UserError(
                f"{grid.source}: evaluate.tasks: got {name!r}{did_you_mean(name, known)}, allowed: {allowed}"
            )


def refuse_stale(results: Path, cells: Iterable[Cell]) -> None:
    """Raise UserError if runs on disk were made by other code: they are never reused silently."""
    stale = {}
    for cell in cells:
        run = run_dir(results, cell)
        why = stale_because(run, cell)
        if why is not None:
            stale[run.path] = why
    if stale:
        path, why = next(iter(stale.items()))
        others = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise UserError(
            f"{path}{others}: stale: {why}; allowed: --rerun-stale (sets such runs aside in {results / 'stale'} and "
            "trains them again), another --results, or the code that made them"
        )


def set_stale_aside(results: Path, cells: Iterable[Cell]) -> list[Path]:
    """Move stale runs to results/stale; gives where they went. Raises UserError if one is being run."""
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
            raise UserError(f"{run.path}: is being run by another process, allowed: wait for it or stop it") from None
    return moved


def retry_failed(results: Path, cells: Iterable[Cell]) -> None:
    """Let failed runs go on from their last checkpoint."""
    for cell in cells:
        run = run_dir(results, cell)
        if run.state()["state"] == "failed":
            with run.lock():
                run.set_state("pending")


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, and the quota of its container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def default_jobs(cells: Iterable[Cell], gpus: int) -> int:
    """As many at once as there are GPUs, or as the cores allow with each cell's threads."""
    return gpus or max(1, usable_cores() // max(cell.threads for cell in cells))


def prepare(results: Path, cell: Cell) -> RunDir:
    """The cell's run directory with what a worker reads, evaluations other grids asked for kept.

    Raises Locked if another process has the run.
    """
    run = run_dir(results, cell)
    with run.lock(patience_s=0.2):
        facts: dict[str, Any] = {}
        if run.cell_path.exists() and stale_because(run, cell) is None:
            record = run.read_record()
            facts = {name: value for name, value in record.items() if name not in CELL_FACTS}
            cell = run.read_cell().with_evaluations(cell.evaluate)
        run.write_cell(cell, **facts)
    return run


def _free_path(path: Path) -> Path:
    """The path, or the first of path-2, path-3 ... that is free."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(candidate for candidate in numbered if not candidate.exists())
