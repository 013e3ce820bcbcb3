"""Where the cells of a sweep run: the protocol of an executor, and the registry of executors.

The sweep (sweep.py) decides which cells are missing, which may start, and what happens to a cell whose job was lost. An
executor starts jobs and reports when they end. It receives run directories and shares no memory with its jobs: the
run's records state what a job did.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.scorer import Scorer
from suite.launch.status import CellStatus
from suite.records import RunDir
from suite.yaml_input import did_you_mean

MAX_STARTS = 3
"""How often a cell is started without getting further before it fails, unless its executor knows better."""

EXECUTORS = {
    "local": "suite.launch.local:LocalExecutor",
    "slurm": "suite.launch.slurm.executor:SlurmExecutor",
}
"""Name -> module and class; a module is imported when its executor is chosen."""


@dataclass(frozen=True)
class Options:
    """The settings of a sweep from which an executor is made; it refuses options that do not apply to it.

    Attributes:
        grid: The grid, whose cells may be submitted.
        results: The results folder.
        scorer: Settings for scoring.
        jobs: Number of cells at once (local).
        gpus: GPUs that the cells may use; each cell gets as many as its plan states (local). None: all, one per cell.
        profile: A cluster profile, by name or path (slurm).
        wait: Whether the sweep watches the jobs until they end; False only for queues.
        report: Whether a report follows the cells.
        event: Called with each line to log.
    """

    grid: Grid
    results: Path
    scorer: Scorer
    jobs: int | None = None
    gpus: int | None = None
    profile: str | None = None
    wait: bool = True
    report: bool = True
    event: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Ended:
    """How the job of a cell ended; if the cell is not finished, the job was lost.

    Attributes:
        cause: One line, for the log and for the cell's record if it fails.
        max_starts: Starts without progress after which a cell whose job was lost fails; None: the job was cancelled,
            and the cell stays pending.
        log: The file with the job's output.
        killed_for_memory: Whether memory is the likely reason; MAX_STARTS such ends in a row fail the cell even if it
            made progress in between, since it would meet the same limit again.
        disk_full: Whether it found no space for a file of its run; the sweep then stops.
    """

    cause: str
    max_starts: int | None = MAX_STARTS
    log: Path | None = None
    killed_for_memory: bool = False
    disk_full: bool = False


class Executor(Protocol):
    """Runs cells. `EXECUTORS` lists the classes by name.

    Attributes:
        is_queue: Whether it accepts any number of cells, orders them itself, and its jobs outlive the sweep.
        poll_s: Seconds between two calls of `poll`.
    """

    is_queue: bool
    poll_s: float

    @classmethod
    def create(cls, options: Options) -> Executor:
        """Make the executor. Raises UserError for an option that does not apply to it."""

    def adopt(self, cells: Sequence[Cell]) -> set[str]:
        """Return the run names of cells that have jobs from an earlier sweep; they count as submitted from now on."""

    def unfit(self, cell: Cell) -> str | None:
        """Return why a cell cannot run here, such as a lack of memory; None if it can, or if that is not known."""

    def room(self) -> int:
        """Return how many more cells may be submitted now."""

    def submit(self, cells: Sequence[Cell]) -> None:
        """Start a job for each cell; its run directory holds cell.json. The first call may have no cells."""

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        """Return the jobs of these submitted cells that have ended, by run name; each end is returned once."""

    def cancel(self, at_once: bool = False) -> None:
        """End all jobs, after they have saved a checkpoint or `at_once`; `poll` returns them as they end."""

    def report(self, to_stderr: bool) -> bool:
        """Make the grid's report, or wait for the job that makes it; returns whether it succeeded.

        With `to_stderr`, nothing is printed on standard output.
        """

    @classmethod
    def cancel_grid(cls, results: Path, grid: Grid) -> list[str]:
        """Cancel the jobs that any sweep has left in the queue for a grid; returns what was cancelled, by name."""

    @classmethod
    def with_jobs(cls, statuses: list[CellStatus], runs: list[RunDir]) -> list[CellStatus]:
        """Return the statuses, with the states of the runs' jobs in the queue."""

    def dry_run(self, cells: Sequence[Cell]) -> list[Path]:
        """Write what `submit` would send, without sending it; returns the files, if there are any."""


def executor_classes() -> list[type[Executor]]:
    """Return all executors."""
    return [executor_class(name) for name in EXECUTORS]


def executor_class(name: str) -> type[Executor]:
    """Return the executor of that name. Raises UserError for an unknown one."""
    if name not in EXECUTORS:
        names = ", ".join(EXECUTORS)
        raise UserError(f"--executor: got {name!r}{did_you_mean(name, EXECUTORS)}, allowed: {names}")
    module, _, attribute = EXECUTORS[name].partition(":")
    return cast(type[Executor], getattr(importlib.import_module(module), attribute))
