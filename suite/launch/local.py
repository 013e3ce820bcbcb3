"""The local executor: each cell is a process on this machine."""

from __future__ import annotations

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from suite.atomic import writing
from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.checks.memory import Launch, MemoryCheck
from suite.launch.executor import Ended, Options
from suite.launch.report import report_command, write_report
from suite.launch.scorer import Scorer
from suite.launch.status import CellStatus
from suite.launch.worker import DISK_FULL
from suite.records import RunDir, run_dir

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
NO_GPU = ("",)
"""The devices of a machine without GPUs: one, shared by all cells; CUDA_VISIBLE_DEVICES is then empty."""
PEERS_S = 30.0
"""How long the processes of a cell may outlive one of them that failed."""


class LocalExecutor:
    """At most `slots` cells at once, each in one process, or in one process for each of its GPUs.

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
        devices: Sequence[str] = NO_GPU,
        event: Callable[[str], None] = lambda text: None,
        memory: MemoryCheck | None = None,
    ) -> None:
        """Make an executor.

        Args:
            grid: The grid.
            results: The results folder.
            scorer: Settings for scoring.
            slots: Cells at once.
            devices: GPUs for the cells, as in CUDA_VISIBLE_DEVICES; cells share one only if there are more slots.
            event: Called with each line to log.
            memory: Which cells fit, and in how many processes; None: all, in one.
        """
        self.grid, self.results, self.scorer, self.slots, self.devices = grid, results, scorer, slots, devices
        self.memory = memory or MemoryCheck(math.inf, "this machine")
        self._event = event
        self._jobs: dict[str, _Job] = {}
        self._held: list[Cell] = []
        """Submitted cells that wait for more GPUs than are free, in the order in which they start."""
        self._dropped: list[str] = []

    @classmethod
    def create(cls, options: Options) -> LocalExecutor:
        """Make an executor with as many slots as --jobs, the GPUs, or cores and memory allow.

        Raises UserError for an option of Slurm, and for more GPUs than there are.
        """
        if options.profile is not None:
            raise UserError("--profile: applies to --executor slurm")
        if not options.wait:
            raise UserError("--no-wait: applies to --executor slurm")
        devices = visible_gpus()
        if options.gpus is not None and options.gpus > len(devices):
            allowed = f"1 to {len(devices)}" if devices else "a machine with GPUs; PyTorch sees none here"
            raise UserError(f"--gpus: got {options.gpus}, allowed: {allowed}")
        devices = devices[: options.gpus]
        memory = MemoryCheck.of_this_machine(options.gpus or 1)
        slots = options.jobs or default_jobs(options.grid.cells, len(devices))
        if not devices and (largest := memory.largest(options.grid.cells)) and slots * largest > memory.limit:
            text = f"cells need up to {largest / 1e9:.1f} GB each, and {memory.device} has {memory.limit / 1e9:.1f} GB"
            if options.jobs is None:
                slots = max(1, int(memory.limit // largest))
                text += f": {slots} at once"
            options.event(text)
        devices = devices or list(NO_GPU)
        return cls(options.grid, options.results, options.scorer, slots, devices, options.event, memory)

    def adopt(self, cells: Sequence[Cell]) -> set[str]:
        """Return no cell: a process of an earlier sweep holds its run's lock, which the sweep checks."""
        return set()

    def unfit(self, cell: Cell) -> str | None:
        """Return why the cell does not fit in the memory of this machine; None if it does."""
        return self.memory.problem(cell)

    def room(self) -> int:
        """Return the free slots with a GPU each, or 0 while a submitted cell waits for its GPUs."""
        places = sum(max(0, self._share - self._uses(device)) for device in self.devices)
        return 0 if self._held else min(self.slots - len(self._jobs), places)

    def submit(self, cells: Sequence[Cell]) -> None:
        """Start the processes of each cell as soon as its GPUs are free, with their output in the run's logs."""
        self._held += cells
        self._start_held()

    @property
    def _share(self) -> int:
        """How many cells may use a device at once."""
        return -(-self.slots // len(self.devices))

    def _uses(self, device: str) -> int:
        return sum(device in job.devices for job in self._jobs.values())

    def _start_held(self) -> None:
        while self._held:
            cell = self._held[0]
            launch = self.memory.launch(cell)
            places = sorted(range(len(self.devices)), key=lambda place: self._uses(self.devices[place]))
            chosen = [self.devices[place] for place in sorted(places[: launch.processes])]
            if any(self._uses(device) >= self._share for device in chosen):
                return
            self._jobs[cell.run_name] = self._start(self._held.pop(0), launch, chosen)
            together = f" in {launch.processes} processes" if launch.processes > 1 else ""
            self._event(f"started: {cell.run_name}{together}")

    def _start(self, cell: Cell, launch: Launch, devices: Sequence[str]) -> _Job:
        run = run_dir(self.results.resolve(), cell)
        log = run.path / "logs" / uuid.uuid4().hex[:8] / "0_log.out"
        settings = (self.scorer.data_root or "", self.scorer.run_code or "")
        command = [sys.executable, "-m", "suite.launch.worker", str(run.path), str(log), *map(str, settings)]
        shared = os.environ | dict.fromkeys(THREAD_VARIABLES, str(cell.threads))
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(filter(None, devices))
        worlds: list[dict[str, str]] = [{}]
        if launch.processes > 1:
            command.append(launch.parallel.model_dump_json())
            worlds = process_environments(launch.processes)
        with writing(log):
            log.parent.mkdir(parents=True)
            output = log.open("w", encoding="utf-8")
        with output:
            processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=shared | world,
                    start_new_session=True,
                )
                for world in worlds
            ]
        return _Job(processes, devices, log)

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        """Return the cells whose processes have exited, and start those that waited for their GPUs."""
        ended = {name: Ended("it was not started", max_starts=None) for name in self._dropped}
        self._dropped.clear()
        for name, job in list(self._jobs.items()):
            code = job.poll()
            if code is not None:
                del self._jobs[name]
                killed, disk_full = code == -signal.SIGKILL, code == DISK_FULL
                ended[name] = Ended(_cause(code), log=job.log, killed_for_memory=killed, disk_full=disk_full)
        self._start_held()
        return ended

    def cancel(self, at_once: bool = False) -> None:
        """Interrupt all processes, or kill them; cells that have not started end."""
        self._dropped += [cell.run_name for cell in self._held]
        self._held.clear()
        for job in self._jobs.values():
            job.signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def report(self, to_stderr: bool) -> bool:
        """Fit and draw in another process."""
        written = write_report(self.results, self.grid.name, stdout=sys.stderr if to_stderr else None)
        if not written:
            command = shlex.join(report_command(self.results, self.grid.name))
            print(f"suite: the report failed; to repeat it: {command}", file=sys.stderr)
        return written

    @classmethod
    def cancel_grid(cls, results: Path, grid: Grid) -> list[str]:
        """Return no jobs, since there is no queue."""
        return []

    @classmethod
    def with_jobs(cls, statuses: list[CellStatus], runs: list[RunDir]) -> list[CellStatus]:
        """Return the statuses unchanged: the locks of runs show which processes are alive."""
        return statuses

    def dry_run(self, cells: Sequence[Cell]) -> list[Path]:
        """Return nothing: processes have no scripts."""
        return []


class _Job:
    """The processes of a cell, one for each of its devices."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], devices: Sequence[str], log: Path) -> None:
        self.processes, self.devices, self.log = processes, devices, log
        self._failed: tuple[int, float] | None = None

    def poll(self) -> int | None:
        """Return the exit code of the first process that failed, else 0; None while one of them runs.

        Processes that outlive a failed one by PEERS_S are killed: they may wait for it forever.
        """
        codes = [process.poll() for process in self.processes]
        if self._failed is None and any(codes):
            self._failed = next(code for code in codes if code), time.monotonic()
        if None not in codes:
            return 0 if self._failed is None else self._failed[0]
        if self._failed is not None and time.monotonic() - self._failed[1] > PEERS_S:
            self.signal(signal.SIGKILL)
        return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the processes that run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def process_environments(count: int) -> list[dict[str, str]]:
    """Return what torchrun would set for each of the processes that train a cell together on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    return [shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs that PyTorch sees, as CUDA_VISIBLE_DEVICES lists them if it is set, else by number."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (out of memory?)"
    if code == DISK_FULL:
        return "there is no space for its files"
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
    return gpus or max(1, usable_cores() // max((cell.threads for cell in cells), default=1))
