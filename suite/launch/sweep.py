"""A sweep: find the cells of a grid that are missing, have an executor run them, and bring each to an end.

The state of a sweep is on disk: a sweep that was killed is started again. The lock of a run, which the worker takes and
not the launcher, decides who trains it. Two sweeps of one grid never train the same run, nor do a sweep and a worker
that an earlier sweep left behind: the second one watches the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from suite.cells import Cell
from suite.errors import DiskFull
from suite.grids import Grid
from suite.launch.branches import must_wait
from suite.launch.executor import MAX_STARTS, Ended, Executor
from suite.launch.interruption import Interruption
from suite.launch.preparation import prepare, write_grid
from suite.launch.scorer import is_finished
from suite.launch.status import CellStatus, cell_status, grid_status, scoring_line
from suite.launch.worker import set_failed
from suite.records import DamagedRecord, Locked, RunDir, run_dir
from suite.train.checkpoint import steps_saved

PROGRESS_S = 1.0
SLICE_S = 0.1
"""Seconds after which a sweep notices that it was interrupted."""


@dataclass(frozen=True)
class Standing:
    """The progress of a sweep at one moment.

    Attributes:
        cells: Number of cells.
        finished: Number of finished cells.
        running: The running cells as (run name, progress from 0 to 1, remaining seconds).
        scoring: What the running cells that are trained are doing, by run name. The time that all of scoring takes is
            not known.
    """

    cells: int
    finished: int
    running: list[tuple[str, float, float | None]]
    scoring: Mapping[str, str] = field(default_factory=dict)


class Watcher(Protocol):
    """Shows the progress of a sweep."""

    def event(self, text: str) -> None:
        """Log what happened to a cell."""

    def progress(self, standing: Standing) -> None:
        """Show the progress of the sweep; called about once a second."""


@dataclass(eq=False)
class _OpenCell:
    """A cell that is not finished.

    `starts` counts the starts since its newest checkpoint, at `step`; `kills` counts kills for memory in a row.
    """

    cell: Cell
    run: RunDir
    starts: int = 0
    step: int = 0
    kills: int = 0


class Sweep:
    """The state machine of a sweep: its cells go from waiting through running to finished.

    A cell that is not finished is in one of three lists: `waiting` (to be submitted), `running` (the executor has a job
    for it), `watched` (the run's lock is held by a process that this executor did not start).
    """

    def __init__(
        self,
        grid: Grid,
        results: Path,
        executor: Executor,
        watcher: Watcher,
        interruption: Interruption | None = None,
        whole: Grid | None = None,
    ) -> None:
        """Make a sweep.

        Args:
            grid: The cells to run.
            results: The results folder.
            executor: Where the cells run.
            watcher: Shows the progress.
            interruption: Once it is requested, the sweep stops; None: never.
            whole: The grid to record, of which `grid` may be a part; None: `grid`.
        """
        self.grid, self.results, self.executor, self.watcher = grid, results, executor, watcher
        self.interruption, self.whole = interruption or Interruption(), whole or grid
        self.waiting: list[_OpenCell] = []
        self.running: list[_OpenCell] = []
        self.watched: list[_OpenCell] = []
        self.cancelled = 0
        self._shown = 0.0

    @cached_property
    def missing(self) -> list[Cell]:
        """The cells that were neither done, failed nor damaged when their states were first read."""
        return [cell for cell in self.grid.cells if not is_finished(run_dir(self.results, cell), cell)]

    def start(self) -> None:
        """Submit what is missing, as far as the executor has room. Raises UserError."""
        missing = [_OpenCell(cell, run_dir(self.results, cell)) for cell in self.missing]
        if len(missing) < len(self.grid.cells):
            self.watcher.event(f"{len(self.grid.cells) - len(missing)} of {len(self.grid.cells)} cells are finished")
        adopted = self.executor.adopt([open_cell.cell for open_cell in missing])
        write_grid(self.results, self.whole)
        for open_cell in missing:
            if open_cell.run.name in adopted:
                self._note_start(open_cell)
                self.running.append(open_cell)
            else:
                self.waiting.append(open_cell)
        if adopted:
            self.watcher.event(f"{len(adopted)} cells have jobs already")
        self._submit(is_first=True)

    def run(self) -> list[CellStatus]:
        """Run what is missing to its end; returns the status of every cell. Raises UserError.

        On the first interruption it lets the processes of this machine save and end, and raises KeyboardInterrupt. A
        second interruption kills them. Jobs in a queue keep running.

        Raises DiskFull, after interrupting the processes of this machine, if one of them or the sweep finds no space:
        all cells would meet the same limit.
        """
        try:
            with self.interruption.deferred():
                self.start()
                while (self.waiting or self.running or self.watched) and not self.interruption.requested:
                    self._pause()
                    self._collect()
                    self._submit()
                if self.interruption.requested:
                    self._stop()
        except (KeyboardInterrupt, DiskFull) as error:
            if not self.executor.is_queue:
                self.executor.cancel(at_once=isinstance(error, KeyboardInterrupt))
            raise
        return grid_status(self.results, self.grid)

    def _pause(self) -> None:
        until = time.monotonic() + self.executor.poll_s
        while (left := until - time.monotonic()) > 0 and not self.interruption.requested:
            time.sleep(min(left, SLICE_S))
        if time.monotonic() - self._shown > PROGRESS_S:
            self._shown = time.monotonic()
            self.watcher.progress(self._standing())

    def _standing(self) -> Standing:
        open_cells = self.running + self.watched
        runs = [open_cell.run for open_cell in open_cells]
        states = [(run.name, run.state()) for run in runs if run.damage() is None]
        is_queue = self.executor.is_queue
        running = [
            (name, float(state.get("progress") or 0.0), state.get("eta_s"))
            for name, state in states
            if state["state"] == "running" or not is_queue
        ]
        total = len(self.grid.cells)
        scoring = {name: scoring_line(state) for name, state in states if state.get("trained")}
        return Standing(total, total - len(open_cells) - len(self.waiting) - self.cancelled, running, scoring)

    def _collect(self) -> None:
        """Decide about the cells whose jobs have ended, and about runs that other processes have released."""
        ended = self.executor.poll([open_cell.cell for open_cell in self.running])
        over = [open_cell for open_cell in self.running if open_cell.run.name in ended]
        released = [open_cell for open_cell in self.watched if not open_cell.run.is_locked()]
        self.running = [open_cell for open_cell in self.running if open_cell not in over]
        self.watched = [open_cell for open_cell in self.watched if open_cell not in released]
        for open_cell in over + released:
            self._decide(open_cell, ended.get(open_cell.run.name))

    def _decide(self, open_cell: _OpenCell, ended: Ended | None) -> None:
        """Move a cell without a job to its next state; `ended` is None if a process of another sweep had the cell."""
        if is_finished(open_cell.run, open_cell.cell):
            status = cell_status(self.results, open_cell.cell)
            outcome = status.cause if status.state == "failed" else status.headline
            self.watcher.event(f"{status.state}: {status.run}: {outcome}")
        elif open_cell.run.is_locked():
            # A worker that outlived its job, or a worker of another sweep.
            self._watch(open_cell)
        elif ended is None:
            self.waiting.insert(0, open_cell)
        else:
            self._lost(open_cell, ended)

    def _watch(self, open_cell: _OpenCell) -> None:
        self.watcher.event(f"watching: {open_cell.run.name}: another process runs it")
        self.watched.append(open_cell)

    def _lost(self, open_cell: _OpenCell, ended: Ended) -> None:
        """Handle the end of a job whose cell is unfinished: leave the cell, restart it, or record that it failed.

        Raises DiskFull if the job ended for lack of space.
        """
        if ended.disk_full:
            state = open_cell.run.state()
            cause = state["cause"] if state["state"] == "pending" else None
            raise DiskFull(cause or f"{open_cell.run.path}: {ended.cause}; free space, and the same command resumes")
        if ended.max_starts is None:
            open_cell.run.set_state("pending", cause=ended.cause, eta_s=None)
            self.cancelled += 1
            self.watcher.event(f"cancelled: {open_cell.run.name}: left pending; the same command resumes it")
            return
        if _step(open_cell.run) > open_cell.step:
            open_cell.starts = 0
        open_cell.kills = open_cell.kills + 1 if ended.killed_for_memory else 0
        if open_cell.starts < ended.max_starts and open_cell.kills < MAX_STARTS:
            self.watcher.event(f"interrupted: {open_cell.run.name}: {ended.cause}; starting it again")
            self.waiting.insert(0, open_cell)
            return
        self._fail(open_cell, ended.cause, log=None if ended.log is None else str(ended.log))

    def _fail(self, open_cell: _OpenCell, cause: str, **facts: Any) -> None:
        with open_cell.run.lock():
            set_failed(open_cell.run, cause, **facts)
        self.watcher.event(f"failed: {open_cell.run.name}: {cause}")

    def _submit(self, is_first: bool = False) -> None:
        """Hand waiting cells to the executor, as many as it has room for."""
        room = self.executor.room() if self.waiting else 0
        chosen: list[_OpenCell] = []
        for open_cell in self._startable() if room else []:
            if len(chosen) == room:
                break
            try:
                prepare(self.results, open_cell.cell, self.watcher.event)
                if (reason := self.executor.unfit(open_cell.cell)) is None:
                    chosen.append(open_cell)
                else:
                    self._fail(open_cell, reason)
                    self.waiting.remove(open_cell)
            except Locked:
                self.waiting.remove(open_cell)
                self._watch(open_cell)
            except DamagedRecord as error:
                self.watcher.event(f"failed: {open_cell.run.name}: {error}")
                self.waiting.remove(open_cell)
        if chosen or is_first:
            self.executor.submit([open_cell.cell for open_cell in chosen])
        for open_cell in chosen:
            self.waiting.remove(open_cell)
            self._note_start(open_cell)
            self.running.append(open_cell)

    def _startable(self) -> Sequence[_OpenCell]:
        """Return the waiting cells that may start, without those that wait for another cell's run or checkpoint."""
        if self.executor.is_queue:  # it orders them itself
            return list(self.waiting)
        unfinished = [open_cell.cell for open_cell in self.waiting + self.watched + self.running]
        return [open_cell for open_cell in self.waiting if not must_wait(open_cell.cell, open_cell.run, unfinished)]

    def _note_start(self, open_cell: _OpenCell) -> None:
        open_cell.starts += 1
        open_cell.step = _step(open_cell.run)

    def _stop(self) -> None:
        """Stop the sweep; the processes of this machine save first."""
        if not self.executor.is_queue:
            self.watcher.event("stopping: running cells end their step and save; interrupt again to stop at once")
            self.executor.cancel()
            while self.running:
                time.sleep(SLICE_S)
                ended = self.executor.poll([open_cell.cell for open_cell in self.running])
                self.running = [open_cell for open_cell in self.running if open_cell.run.name not in ended]
            self.watcher.event("stopped; the same command resumes")
        raise KeyboardInterrupt


def _step(run: RunDir) -> int:
    return max(steps_saved(run), default=0)
