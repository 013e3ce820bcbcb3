"""The Slurm executor: cells become jobs of arrays, and each poll queries Slurm once for their states.

Jobs outlive the sweep: a sweep that is started again submits only cells that are not finished and have no job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from suite.atomic import write_text
from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch import background_scoring
from suite.launch.executor import MAX_STARTS, Ended, Options
from suite.launch.report import report_path
from suite.launch.scorer import Scorer, is_finished
from suite.launch.slurm import queue
from suite.launch.slurm.profile import Profile, load_profile
from suite.launch.slurm.queue import ENDED, WORDS, Job
from suite.launch.slurm.resources import memory_check
from suite.launch.slurm.submit import Submission, Submitter, jobs_folder
from suite.launch.status import CellStatus
from suite.records import GRIDS, RunDir, run_dir

GRACE_S = 10.0
"""How long after its submission a job may be unknown to the queue."""


class SlurmExecutor:
    """Jobs of a cluster with a profile; a report job waits for all of them."""

    is_queue = True

    def __init__(
        self,
        grid: Grid,
        results: Path,
        profile: Profile,
        scorer: Scorer,
        with_report: bool = True,
        event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.grid, self.results, self.profile, self.scorer = grid, results, profile, scorer
        self.with_report, self._event = with_report, event
        self.poll_s = profile.refresh_s
        self._memory = memory_check(profile)
        self._queue: dict[str, Job] = {}
        self._jobs: dict[str, list[str]] = {}
        self._submitted: dict[str, float] = {}
        self._scoring_jobs: dict[str, str] = {}
        self._report_job: str | None = None
        self._has_polled = False

    @classmethod
    def create(cls, options: Options) -> SlurmExecutor:
        """Make an executor with that profile, overridden by the grid's `launch`.

        Raises UserError for an option of the local executor.
        """
        if options.jobs is not None:
            raise UserError("--jobs: applies to --executor local; on Slurm, set max_jobs in the profile")
        if options.gpus is not None:
            raise UserError("--gpus: applies to --executor local; on Slurm, set gpus_per_node in the profile")
        profile = load_profile(options.profile, options.grid.launch)
        return cls(options.grid, options.results, profile, options.scorer, options.report, options.event)

    def adopt(self, cells: Sequence[Cell]) -> set[str]:
        """Return the cells with jobs in the queue; Slurm is queried only if a cell ever had one.

        Raises UserError where there is no Slurm.
        """
        queue.require_commands()
        recorded = {cell.run_name: queue.job_ids(run_dir(self.results, cell)) for cell in cells}
        if any(recorded.values()):
            self._queue = queue.query()
        for name, jobs in recorded.items():
            if alive := self._alive(jobs):
                self._note(name, alive)
        if self._jobs:
            self._report_job = next(iter(self._alive([queue.recorded_report(self._folder)])), None)
        return set(self._jobs)

    def unfit(self, cell: Cell) -> str | None:
        """Return why a cell does not fit in the memory that its job requests; None if it does.

        Where no amount is requested, Slurm decides. Meshes of GPUs are chosen so that cells fit (resources.py).
        """
        return None if self._memory is None else self._memory.problem(cell)

    def room(self) -> int:
        """Return no limit for the first call of `submit`, whose arrays observe max_jobs; later, the free part of it."""
        return max(0, self.profile.max_jobs - len(self._jobs)) if self._has_polled else sys.maxsize

    def submit(self, cells: Sequence[Cell]) -> None:
        """Submit arrays, and a report job that replaces a waiting one.

        Without any cell or job, only a missing report is submitted.
        """
        if not cells and (self._jobs or report_path(self.results, self.grid.name).exists()):
            return
        room = min(self.room(), self.profile.max_jobs)
        caps = {"max_jobs": room, "max_eval_jobs": min(room, self.profile.max_eval_jobs)}
        submitter = Submitter(self.grid, self.results, self.profile.model_copy(update=caps), self.scorer)
        others = [job for jobs in self._jobs.values() for job in self._alive(jobs)]
        jobs = submitter.submit(cells, self.with_report, others)
        if self.with_report:
            if superseded := self._alive([self._report_job]):
                queue.cancel(superseded)
            (self._report_job,) = jobs["report"]
        for cell in cells:
            self._note(cell.run_name, jobs[cell.run_name])
        sent = [f"{len(one.jobs)} in job {one.jobs[0].partition('_')[0]}" for one in submitter.sent]
        if sent:
            self._event(f"submitted: {', '.join(sent)}")

    def poll(self, cells: Sequence[Cell]) -> dict[str, Ended]:
        """Return finished cells and those whose jobs were lost, then submit the scoring of checkpoints."""
        self._queue, self._has_polled = queue.query(), True
        runs = {cell.run_name: run_dir(self.results, cell) for cell in cells}
        finished = [cell.run_name for cell in cells if is_finished(runs[cell.run_name], cell)]
        lost = [name for name in runs if name not in finished and not self._has_living_job(name)]
        last = queue.last_states([runs[name] for name in lost], self._queue)
        ended = dict.fromkeys(finished, Ended(WORDS["COMPLETED"]))
        ended |= {name: self._loss(runs[name], last) for name in lost}
        for name in ended:
            del self._jobs[name]
        self._score_retained([cell for cell in cells if cell.run_name not in ended])
        return ended

    def _has_living_job(self, name: str) -> bool:
        jobs = [self._queue[job] for job in self._jobs[name] if job in self._queue]
        is_new = time.monotonic() - self._submitted[name] < GRACE_S
        return any(job.alive for job in jobs) or (not jobs and is_new)

    def _loss(self, run: RunDir, last: dict[str, Job]) -> Ended:
        """Return how the jobs of an unfinished cell ended, and what that means for it."""
        jobs = self._jobs[run.name]
        states = [(self._queue.get(job) or last.get(job) or Job(ENDED)).state for job in jobs]
        log = queue.log_of(run)
        state = queue.with_memory_kills(_worst(states), log)
        word = WORDS.get(state, state.lower())
        if state == "CANCELLED":
            return Ended(word, max_starts=None, log=log)
        # More starts give no more memory, unless the cell got further in the last one.
        is_memory = state == "OUT_OF_MEMORY"
        cause = queue.with_tail(f"Slurm job {jobs[0]}: {word}", log)
        return Ended(cause, 1 if is_memory else MAX_STARTS, log, killed_for_memory=is_memory)

    def cancel(self, at_once: bool = False) -> None:
        """Cancel the jobs of all cells of the grid, and the report's."""
        self.cancel_grid(self.results, self.grid)

    @classmethod
    def cancel_grid(cls, results: Path, grid: Grid) -> list[str]:
        """Cancel the living jobs of a grid; returns the names of their runs, and "report". Raises UserError."""
        runs = [run_dir(results, cell) for cell in grid.cells]
        jobs = {run.name: [facts["job"] for facts in run.jobs().values()] for run in runs}
        report = queue.recorded_report(jobs_folder(results, grid))
        if report is None and not any(jobs.values()):
            return []
        queued = queue.query()
        jobs["report"] = [] if report is None else [report]
        alive = {name: [job for job in ids if job in queued and queued[job].alive] for name, ids in jobs.items()}
        doomed = [job for ids in alive.values() for job in ids]
        if doomed:
            queue.cancel(doomed)
            for run in runs:
                if alive[run.name]:
                    queue.record_cancelled(run)
        return [name for name, ids in alive.items() if ids]

    @classmethod
    def with_jobs(cls, statuses: list[CellStatus], runs: list[RunDir]) -> list[CellStatus]:
        """Return the statuses with the states of jobs, if any run has one."""
        return queue.with_slurm(statuses, runs)

    def report(self, to_stderr: bool) -> bool:
        """Wait for the report job, if there is one."""
        if self._report_job is None:
            return True
        self._event(f"waiting for the report, job {self._report_job}")
        while self._alive([self._report_job]):
            time.sleep(self.poll_s)
            self._queue = queue.query()
        state = self._queue.get(self._report_job, Job(ENDED)).state
        succeeded = state in ("COMPLETED", ENDED)
        where = f", {report_path(self.results, self.grid.name)}" if succeeded else ""
        self._event(f"report: {WORDS.get(state, state)}{where}")
        return succeeded

    def dry_run(self, cells: Sequence[Cell]) -> list[Path]:
        """Write the batch scripts to results/grids/<grid>/slurm-dry."""
        submitter = Submitter(self.grid, self.results, self.profile, self.scorer, dry=True)
        submitter.submit(cells, self.with_report)
        folder = self.results / GRIDS / self.grid.name / "slurm-dry"
        for old in folder.glob("*.sh"):
            old.unlink()
        return [_write(folder, number, one) for number, one in enumerate(submitter.sent, start=1)]

    @property
    def _folder(self) -> Path:
        return jobs_folder(self.results, self.grid)

    def _alive(self, jobs: Iterable[str | None]) -> list[str]:
        return [job for job in jobs if job in self._queue and self._queue[job].alive]

    def _note(self, name: str, jobs: list[str]) -> None:
        self._jobs[name], self._submitted[name] = jobs, time.monotonic()

    def _score_retained(self, cells: Sequence[Cell]) -> None:
        """Submit the scoring of checkpoints that cells retain while they train; training does not wait for it."""
        due = [cell for cell in cells if self._is_due(run_dir(self.results, cell))]
        room = self.profile.max_eval_jobs - len(self._alive(self._scoring_jobs.values()))
        if due and room > 0:
            submitter = Submitter(self.grid, self.results, self.profile, self.scorer)
            self._scoring_jobs |= submitter.score_retained(due, room)

    def _is_due(self, run: RunDir) -> bool:
        last = self._scoring_jobs.get(run.name)
        # After a scoring job that failed or was cancelled, retained checkpoints are scored at the end of training.
        may_follow = last is None or self._queue.get(last, Job(ENDED)).state in ("COMPLETED", ENDED)
        return may_follow and bool(background_scoring.retained_steps(run)) and not run.state().get("trained")


def _write(folder: Path, number: int, submission: Submission) -> Path:
    path = folder / f"{number:03}.sh"
    write_text(path, submission.script + "\n")
    return path


def _worst(states: Sequence[str]) -> str:
    """Return the state that shows how a cell's jobs ended; Slurm cancels a job whose dependency failed."""
    bad = [state for state in states if state not in ("COMPLETED", "CANCELLED")]
    return bad[0] if bad else max(states, key=("COMPLETED", "CANCELLED").index)
