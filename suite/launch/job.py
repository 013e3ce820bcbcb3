"""What a Slurm job runs: one stage of a cell, given the path of its run directory and how to divide it.

Training runs in a thread of its own, and the main one waits: submitit's signal handler, which runs there, then lets
training come to the end of its step, where all processes agree, save together and are done; the handler waits for
that and requeues the job. Nothing of a run is in the job: whoever starts reads the newest whole checkpoint.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import submitit

from suite.launch import beside, worker
from suite.records import Locked, RunDir
from suite.train.parallel import Parallel, World, joined

if TYPE_CHECKING:
    from suite.cells import Cell

Stage = Literal["train", "evaluate"]

TO_BE_SCORED = "trained; to be scored"
WARNED = "warned by Slurm and saved; goes on when it is scheduled again"
ORPHAN_PATIENCE_S = 5.0


class CellJob:
    """One stage of the cell at `run_path`, to be submitted through submitit, which asks it for `checkpoint`."""

    def __init__(
        self, run_path: Path, stage: Stage, scoring: worker.Scoring | None = None, parallel: Parallel | None = None
    ) -> None:
        self.run_path, self.stage, self.scoring = run_path, stage, scoring or worker.Scoring()
        self.parallel = parallel or Parallel()
        self._stopping: threading.Event | None = None
        self._ended: threading.Event | None = None

    def __call__(self) -> str:
        """Do the stage, from where the run stands; a failure is in the run's records. Gives the run's state."""
        run = RunDir(self.run_path)
        if self.stage == "evaluate":
            with _held(run):
                return self._evaluate(run)
        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        return self._in_thread(lambda: self._train(run))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit's handler in the first process when Slurm warns: gives what to run after the requeue."""
        if self._stopping is not None and self._ended is not None:
            self._stopping.set()
            self._ended.wait()
        run = RunDir(self.run_path)
        if run.state()["state"] == "running":
            run.set_state("pending", cause=WARNED, eta_s=None)
        return submitit.helpers.DelayedSubmission(CellJob(self.run_path, self.stage, self.scoring, self.parallel))

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
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _train(self, run: RunDir) -> str:
        with joined(self.parallel) as world, _held(run) if world.is_first else nullcontext():
            state = run.state()
            if not world.any(world.is_first and state["state"] != "failed" and not state.get("trained")):
                return str(state["state"])
            cell = run.read_cell()
            if not world.joined:
                return worker.attempt(run, lambda: self._train_to_end(run, cell, world))
            try:
                if world.is_first:
                    started = state.get("started") or time.time()
                    run.set_state("running", started=started, finished=None, log=worker.log_path())
                self._train_to_end(run, cell, world)
            except Exception as error:
                # Processes that lose one of their own fail, too: who came first knows the cause.
                if world.is_first:
                    time.sleep(2.0)
                if run.state()["state"] != "failed":
                    worker.set_failed(run, worker.describe(error))
                raise
            return "done"

    def _train_to_end(self, run: RunDir, cell: Cell, world: World) -> None:
        from suite import data
        from suite.train.loop import train

        assert self._stopping is not None
        if world.is_first:
            worker.refuse_stale_run(run, cell)
            corpus = data.prepare(cell.data, cache=worker.cache_of(run))
            worker.begin(run, cell, corpus)
        world.wait()
        if not world.is_first:
            corpus = data.prepare(cell.data, cache=worker.cache_of(run))
        stopping = self._stopping.is_set

        def should_stop() -> bool:
            if world.is_first:
                beside.keep_due(run, cell)  # for the job that scores
            return stopping()

        outcome = train(cell, corpus, run, world, should_stop)
        if not world.is_first:
            return
        if outcome == "cut":
            run.set_state("pending", cause=WARNED, eta_s=None)
            return
        run.set_state("running", trained=True)
        if worker.lacks_scores(run, cell):
            run.set_state("pending", cause=TO_BE_SCORED, eta_s=None)
        else:
            worker.set_done(run)

    def _evaluate(self, run: RunDir) -> str:
        state, cell = run.state(), run.read_cell()
        if not state.get("trained") or state["state"] == "failed" or not worker.lacks_scores(run, cell):
            return str(state["state"])

        def score() -> None:
            from suite import data

            worker.refuse_stale_run(run, cell)
            corpus = data.prepare(cell.data, cache=worker.cache_of(run))
            worker.score_missing(run, cell, corpus, self.scoring)
            worker.set_done(run)

        return worker.attempt(run, score)


@contextmanager
def _held(run: RunDir) -> Iterator[None]:
    """The run's lock, waited for: a node that was lost may still run what this job is a second start of."""
    told = False
    while True:
        try:
            with run.lock(patience_s=ORPHAN_PATIENCE_S):
                yield
                return
        except Locked:
            if not told:
                print(f"{run.name}: another process holds it; waiting", file=sys.stderr)
            told = True
