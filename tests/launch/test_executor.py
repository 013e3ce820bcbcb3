"""A sweep runs its cells with any class that follows the executor protocol, here one of threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from event_log import EventLog
from sweep_processes import TINY, runs_of

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid, load_grid
from suite.launch.executor import Ended, Executor, Options, executor_class
from suite.launch.sweep import Sweep
from suite.launch.worker import run_cell
from suite.records import run_dir


class ThreadExecutor:
    """Runs one cell at a time in a thread of this process. The first jobs, as many as `lost`, do nothing."""

    is_queue = False
    poll_s = 0.01

    def __init__(self, results: Path, lost: int = 0, end: Ended | None = None) -> None:
        self.results, self.lost = results, lost
        self.end = end or Ended("the thread ended")
        self.submitted: list[str] = []
        self._threads: dict[str, threading.Thread] = {}

    @classmethod
    def create(cls, options: Options) -> ThreadExecutor:
        return cls(options.results)

    def adopt(self, cells: Sequence[Cell]) -> set[str]:
        return set()

    def unfit(self, cell: Cell) -> str | None:
        return None

    def room(self) -> int:
        return 1 - len(self._threads)

    def submit(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            self.submitted.append(cell.run_name)
            is_lost = len(self.submitted) <= self.lost
            path = run_dir(self.results, cell).path
            thread = threading.Thread(target=(lambda: None) if is_lost else (lambda path=path: run_cell(path)))
            thread.start()
            self._threads[cell.run_name] = thread

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        ended = [name for name, thread in self._threads.items() if not thread.is_alive()]
        for name in ended:
            del self._threads[name]
        return dict.fromkeys(ended, self.end)

    def cancel(self, at_once: bool = False) -> None:
        raise NotImplementedError

    def report(self, to_stderr: bool) -> bool:
        return True

    def dry_run(self, cells: Sequence[Cell]) -> list[Path]:
        return []


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("epochs: 8", "epochs: 1"))
    return load_grid(str(path))


def test_a_sweep_runs_a_grid_with_an_executor_of_a_few_methods(grid: Grid, tmp_path: Path) -> None:
    executor: Executor = ThreadExecutor(tmp_path / "results")
    statuses = Sweep(grid, tmp_path / "results", executor, EventLog()).run()
    assert [status.state for status in statuses] == ["done", "done"]
    assert len(runs_of(tmp_path / "results")) == 2
    again = ThreadExecutor(tmp_path / "results")
    Sweep(grid, tmp_path / "results", again, EventLog()).run()
    assert again.submitted == []


def test_a_lost_job_is_started_again_until_the_number_of_starts_that_its_end_allows(grid: Grid, tmp_path: Path) -> None:
    executor, log = ThreadExecutor(tmp_path / "results", lost=2), EventLog()
    statuses = Sweep(grid, tmp_path / "results", executor, log).run()
    assert [status.state for status in statuses] == ["done", "done"]
    first, second = (status.run for status in statuses)
    assert executor.submitted == [first, first, first, second]
    assert sum("the thread ended" in event for event in log.events) == 2

    executor = ThreadExecutor(tmp_path / "fails", lost=2, end=Ended("out of memory", max_starts=2))
    one, other = Sweep(grid, tmp_path / "fails", executor, EventLog()).run()
    assert (one.state, one.cause) == ("failed", "out of memory")
    assert other.state == "done"


class SavingThenKilled(ThreadExecutor):
    """Its jobs save one more checkpoint each, and are then killed."""

    def submit(self, cells: Sequence[Cell]) -> None:
        super().submit(cells)
        for cell in cells:
            (run_dir(self.results, cell).checkpoints / f"step-{len(self.submitted)}").mkdir(parents=True)


def test_a_cell_that_is_killed_for_memory_fails_after_three_starts_although_it_saves(
    grid: Grid, tmp_path: Path
) -> None:
    one_cell = replace(grid, cells=grid.cells[:1])
    killed = Ended("killed", killed_for_memory=True)
    executor = SavingThenKilled(tmp_path / "results", lost=9, end=killed)
    (status,) = Sweep(one_cell, tmp_path / "results", executor, EventLog()).run()
    assert (status.state, status.cause) == ("failed", "killed")
    assert len(executor.submitted) == 3


class Second(ThreadExecutor):
    """Another sweep has the run of its first job before that starts, and releases it after some time."""

    def __init__(self, results: Path) -> None:
        super().__init__(results, lost=1)
        self.locks, self.polls = ExitStack(), 0

    def submit(self, cells: Sequence[Cell]) -> None:
        if cells and not self.submitted:
            self.locks.enter_context(run_dir(self.results, cells[0]).lock())
        super().submit(cells)

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        self.polls += 1
        if self.polls == 20:
            self.locks.close()
        return super().poll(cells)


def test_a_sweep_says_that_another_one_was_faster(grid: Grid, tmp_path: Path) -> None:
    executor, log = Second(tmp_path / "results"), EventLog()
    one, other = Sweep(grid, tmp_path / "results", executor, log).run()
    assert (one.state, other.state) == ("done", "done")
    assert f"watching: {one.run}: another process runs it" in log.events


def test_a_cancelled_job_leaves_its_cell_pending(grid: Grid, tmp_path: Path) -> None:
    executor = ThreadExecutor(tmp_path / "results", lost=1, end=Ended("cancelled", max_starts=None))
    one, other = Sweep(grid, tmp_path / "results", executor, EventLog()).run()
    assert (one.state, one.note) == ("pending", "cancelled")
    assert other.state == "done"
    assert len(executor.submitted) == 2


def test_executors_are_found_by_name() -> None:
    assert executor_class("local").is_queue is False
    assert executor_class("slurm").is_queue is True
    with pytest.raises(UserError, match=r"--executor: got 'slrum'.*local, slurm"):
        executor_class("slrum")
