"""The local executor: each cell is a process on this machine."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.checks.memory import MemoryCheck
from suite.launch.executor import Ended, Options
from suite.launch.report import report_command, write_report
from suite.launch.scorer import Scorer
from suite.launch.status import CellStatus
from suite.records import RunDir, run_dir

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalExecutor:
    """At most `slots` processes at once; with GPUs, each process sees one of them.

    Each process is in a separate session: Ctrl-C reaches the sweep alone, which then lets each process end its step.
    """

    is_queue = False
    poll_s = 0.1

    def __init__(
        self,
        grid: Grid,
        results: Path,
        scorer: Scorer,
        slots: int,
        gpus: int = 0,
        event: Callable[[str], None] = lambda text: None,
        memory: MemoryCheck | None = None,
    ) -> None:
        self.grid, self.results, self.scorer, self.slots, self.gpus = grid, results, scorer, slots, gpus
        self.memory = memory or MemoryCheck(math.inf, "this machine")
        self._event = event
        self._jobs: dict[str, _Job] = {}

    @classmethod
    def create(cls, options: Options) -> LocalExecutor:
        """Make an executor with as many slots as --jobs, the GPUs, or cores and memory allow.

        Raises UserError for an option of Slurm.
        """
        import torch

        if options.profile is not None:
            raise UserError("--profile: applies to --executor slurm")
        if not options.wait:
            raise UserError("--no-wait: applies to --executor slurm")
        gpus = torch.cuda.device_count()
        memory = MemoryCheck.of_this_machine()
        slots = options.jobs or default_jobs(options.grid.cells, gpus)
        if not gpus and (largest := memory.largest(options.grid.cells)) and slots * largest > memory.limit:
            text = f"cells need up to {largest / 1e9:.1f} GB each, and {memory.device} has {memory.limit / 1e9:.1f} GB"
            if options.jobs is None:
                slots = max(1, int(memory.limit // largest))
                text += f": {slots} at once"
            options.event(text)
        return cls(options.grid, options.results, options.scorer, slots, gpus, options.event, memory)

    def adopt(self, cells: Sequence[Cell]) -> set[str]:
        """Return no cell: a process of an earlier sweep holds its run's lock, which the sweep checks."""
        return set()

    def unfit(self, cell: Cell) -> str | None:
        """Return why the cell does not fit in the memory of this machine; None if it does."""
        return self.memory.problem(cell)

    def room(self) -> int:
        """Return the free slots."""
        return self.slots - len(self._jobs)

    def submit(self, cells: Sequence[Cell]) -> None:
        """Start a process for each cell, its output in a new folder of the run's logs."""
        for cell in cells:
            used = {job.slot for job in self._jobs.values()}
            slot = next(slot for slot in range(self.slots) if slot not in used)
            self._jobs[cell.run_name] = self._start(cell, slot)
            self._event(f"started: {cell.run_name}")

    def _start(self, cell: Cell, slot: int) -> _Job:
        run = run_dir(self.results.resolve(), cell)
        log = run.path / "logs" / uuid.uuid4().hex[:8] / "0_log.out"
        log.parent.mkdir(parents=True)
        settings = (self.scorer.data_root or "", self.scorer.run_code or "")
        gpu = str(slot % self.gpus) if self.gpus else ""
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "suite.launch.worker", run.path, log, *settings],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(cell.threads)) | {"CUDA_VISIBLE_DEVICES": gpu},
                start_new_session=True,
            )
        return _Job(process, slot, log)

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        """Return the processes that have exited."""
        ended = {}
        for name, job in list(self._jobs.items()):
            code = job.process.poll()
            if code is not None:
                del self._jobs[name]
                ended[name] = Ended(_cause(code), log=job.log, killed_for_memory=code == -signal.SIGKILL)
        return ended

    def cancel(self, at_once: bool = False) -> None:
        """Interrupt all processes, or kill them."""
        for job in self._jobs.values():
            if job.process.poll() is None:
                job.process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def report(self, to_stderr: bool) -> bool:
        """Fit and draw in another process."""
        written = write_report(self.results, self.grid.name, stdout=sys.stderr if to_stderr else None)
        if not written:
            command = shlex.join(report_command(self.results, self.grid.name))
            print(f"suite: the report failed; to repeat it: {command}", file=sys.stderr)
        return written

    @classmethod
    def cancel_grid(cls, results: Path, grid: Grid) -> list[str]:
        """Return nothing: there is no queue."""
        return []

    @classmethod
    def with_jobs(cls, statuses: list[CellStatus], runs: list[RunDir]) -> list[CellStatus]:
        """Return the statuses unchanged: the locks of runs show which processes are alive."""
        return statuses

    def dry_run(self, cells: Sequence[Cell]) -> list[Path]:
        """Return nothing: processes have no scripts."""
        return []


class _Job:
    """A process in a slot."""

    def __init__(self, process: subprocess.Popen[bytes], slot: int, log: Path) -> None:
        self.process, self.slot, self.log = process, slot, log


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (out of memory?)"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process exited with code {code} without recording a result"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def default_jobs(cells: Iterable[Cell], gpus: int) -> int:
    """Return the number of cells at once: one per GPU, or on CPUs as many as the cores allow."""
    return gpus or max(1, usable_cores() // max(cell.threads for cell in cells))
