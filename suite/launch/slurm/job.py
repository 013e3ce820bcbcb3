"""What a Slurm job runs: one stage of a cell, given the path of its run directory and how to distribute it.

Training runs in a thread while the main thread waits. submitit's signal handler runs in the main thread and requests a
stop: all processes end the same step and save together; then the handler requeues the job. The job holds no state of
the run: each start reads the newest complete checkpoint.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import submitit

from suite.launch import background_scoring, scoring, worker
from suite.launch.scorer import Scorer
from suite.records import Locked, RunDir
from suite.train.parallel import Parallel, World, process_group

if TYPE_CHECKING:
    from suite.cells import Cell

Stage = Literal["train", "evaluate", "score"]
"""Train; evaluate the final weights and the retained checkpoints that are left; score those during training."""

TO_BE_SCORED = "trained; to be scored"
WARNED = "its time limit is near: saved; resumes when it is scheduled again"
PREEMPTED = "preempted: saved; resumes when it is scheduled again"
ORPHAN_PATIENCE_S = 5.0
SIGNAL_POLL_S = 0.5
"""How often the main thread looks for signals while another thread trains."""


class CellJob:
    """One stage of the cell at `run_path`, to be submitted through submitit, which calls `checkpoint`."""

    def __init__(
        self, run_path: Path, stage: Stage, scorer: Scorer | None = None, parallel: Parallel | None = None
    ) -> None:
        self.run_path, self.stage, self.scorer = run_path, stage, scorer or Scorer()
        self.parallel = parallel or Parallel()
        self._stopping: threading.Event | None = None
        self._ended: threading.Event | None = None

    def __call__(self) -> str:
        """Run the stage and return the run's state; a failure is recorded in the run."""
        run = RunDir(self.run_path)
        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        if self.stage == "score":
            return self._score_retained(run)
        if self.stage == "evaluate":
            return self._evaluate(run)
        return self._in_thread(lambda: self._train(run))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what to run after the requeue; submitit's handler calls it in the first process on a warning."""
        if self._stopping is not None and self._ended is not None:
            self._stopping.set()
            self._ended.wait()
        run = RunDir(self.run_path)
        state = run.state()
        if self.stage != "score" and (state["state"] == "running" or state["cause"] == WARNED):
            run.set_state("pending", cause=PREEMPTED if _is_preempted() else WARNED, eta_s=None)
        return submitit.helpers.DelayedSubmission(CellJob(self.run_path, self.stage, self.scorer, self.parallel))

    def _in_thread(self, work: Callable[[], str]) -> str:
        self._stopping, self._ended = threading.Event(), threading.Event()
        outcome: list[str | BaseException] = []

        def do() -> None:
            assert self._ended is not None
            try:
                outcome.append(work())
            except BaseException as error:
                outcome.append(error)
            finally:
                self._ended.set()

        thread = threading.Thread(target=do, name="training")
        thread.start()
        while thread.is_alive():
            # With a timeout, because a signal that another thread receives is handled when this thread wakes.
            thread.join(SIGNAL_POLL_S)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _train(self, run: RunDir) -> str:
        def is_open(state: dict[str, Any]) -> bool:
            return state["state"] != "failed" and not state.get("trained")

        return self._together(run, is_open, self._train_to_end)

    def _evaluate(self, run: RunDir) -> str:
        def is_open(state: dict[str, Any]) -> bool:
            return bool(
                state.get("trained") and state["state"] != "failed" and scoring.needs_scoring(run, run.read_cell())
            )

        return self._together(run, is_open, self._score)

    def _together(
        self, run: RunDir, is_open: Callable[[dict[str, Any]], bool], work: Callable[[RunDir, Cell, World], None]
    ) -> str:
        """Do `work` on a run if it is open, in all processes of the job; the first one holds the lock."""
        with process_group(self.parallel) as world, _held(run) if world.is_first else nullcontext():
            state = run.state()
            if not world.any(world.is_first and is_open(state)):
                return str(state["state"])
            cell = run.read_cell()
            if not world.distributed:
                return worker.attempt(run, lambda: work(run, cell, world), log=_log())
            try:
                if world.is_first:
                    started = state.get("started") or time.time()
                    run.set_state("running", started=started, finished=None, log=str(_log()))
                work(run, cell, world)
            except Exception as error:
                # The other processes fail as a consequence; the first failure records the cause.
                if world.is_first:
                    time.sleep(worker.FIRST_CAUSE_S)
                if run.state()["state"] != "failed":
                    worker.set_failed(run, worker.describe(error))
                raise
            return "done"

    def _train_to_end(self, run: RunDir, cell: Cell, world: World) -> None:
        from suite.train.loop import train

        assert self._stopping is not None
        corpus = worker.prepare_together(run, cell, world, lambda corpus: worker.begin(run, cell, corpus, self.scorer))
        stopping = self._stopping.is_set

        def should_stop() -> bool:
            if world.is_first:
                background_scoring.retain_due(run, cell)  # a separate job scores it
            return stopping()

        outcome = train(cell, corpus, run, world, should_stop)
        if not world.is_first:
            return
        if outcome != "done":
            run.set_state("pending", cause=WARNED, eta_s=None)
            return
        run.set_state("running", trained=True)
        if scoring.needs_scoring(run, cell):
            run.set_state("pending", cause=TO_BE_SCORED, eta_s=None)
        else:
            scoring.set_done(run)

    def _score(self, run: RunDir, cell: Cell, world: World) -> None:
        retained = background_scoring.retained_folder(run)
        # Wait for a job that is still scoring retained checkpoints.
        with _held(RunDir(retained)) if world.is_first and retained.exists() else nullcontext():
            scoring.score_missing(run, cell, worker.prepare_together(run, cell, world), self.scorer, world)
        if world.is_first:
            scoring.set_done(run)

    def _score_retained(self, run: RunDir) -> str:
        """Score while another process trains and holds the run; only scores are written."""
        with (
            process_group(self.parallel) as world,
            _held(RunDir(background_scoring.retained_folder(run))) if world.is_first else nullcontext(),
        ):
            cell = run.read_cell()
            background_scoring.score_retained(run, cell, worker.prepare_together(run, cell, world), self.scorer, world)
        return str(run.state()["state"])


def _log() -> Path:
    """Return the file with the output of this job."""
    return Path(submitit.JobEnvironment().paths.stdout)


def _is_preempted() -> bool:
    """Return whether this job is being preempted; the signal is the same as before a time limit."""
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    return re.search(r"PreemptTime=\d", subprocess.run(command, capture_output=True, text=True).stdout) is not None


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """Wait for the run's lock: a lost node may still run the process that this job replaces."""
    is_logged = False
    while True:
        try:
            with run.lock(patience_s=ORPHAN_PATIENCE_S):
                yield
                return
        except Locked:
            if not is_logged:
                print(f"{run.name}: another process holds it; waiting", file=sys.stderr)
            is_logged = True
