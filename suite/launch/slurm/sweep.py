"""A sweep on Slurm: submit what is missing, then watch our own files, with one question to Slurm per refresh.

Jobs go on without us: a sweep that is stopped or given again submits only what neither is finished nor has a job.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from suite.atomic import write_text
from suite.cells import Cell
from suite.grids import Grid
from suite.launch import background_scoring
from suite.launch.scorer import Scorer, is_finished
from suite.launch.slurm import queue
from suite.launch.slurm.profile import Profile
from suite.launch.slurm.queue import ENDED, WORDS, Job
from suite.launch.slurm.submit import Submission, Submitter, jobs_folder, report_path
from suite.launch.status import CellStatus, cell_status, grid_status
from suite.launch.sweep import MAX_STARTS, Standing, Watcher, prepare, write_grid
from suite.launch.worker import set_failed
from suite.records import GRIDS, Locked, RunDir, run_dir
from suite.train.checkpoint import steps_saved

GRACE_S = 10.0
"""A job may be unknown to the queue so long after it was submitted."""


@dataclass
class _Watched:
    """A cell with jobs in Slurm."""

    cell: Cell
    run: RunDir
    jobs: list[str]
    starts: int = 1
    step: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass
class SlurmSweep:
    """What a grid is missing, on Slurm."""

    grid: Grid
    results: Path
    profile: Profile
    scoring: Scorer
    watcher: Watcher
    report: bool = True
    watched: list[_Watched] = field(default_factory=list)
    dead: list[_Watched] = field(default_factory=list)
    report_job: str | None = None
    reported: bool = True
    queue: dict[str, Job] = field(default_factory=dict)
    scorers: dict[str, str] = field(default_factory=dict)
    cancelled: int = 0

    def submit(self) -> None:
        """Send what is missing and has no job yet. Raises UserError."""
        write_grid(self.results, self.grid)
        missing = [cell for cell in self.grid.cells if not is_finished(run_dir(self.results, cell), cell)]
        self.watcher.event(f"{len(self.grid.cells) - len(missing)} of {len(self.grid.cells)} cells need nothing")
        runs = {cell: run_dir(self.results, cell) for cell in missing}
        had = {cell: queue.job_ids(run) for cell, run in runs.items()}
        if any(had.values()):
            self.queue = queue.ask()
        new = []
        for cell in missing:
            if self._alive(had[cell]):
                self.watched.append(_Watched(cell, runs[cell], had[cell], step=_step(runs[cell])))
            else:
                new.append(cell)
        if self.watched:
            self.watcher.event(f"{len(self.watched)} cells have jobs already")
            self.report_job = next(iter(self._alive([queue.recorded_report(self.folder)])), None)
        if new or not (self.watched or report_path(self.results, self.grid.name).exists()):
            self._send(new, self.profile)

    def watch(self) -> list[CellStatus]:
        """Wait until every cell is done or has failed; gives how they stand. Jobs outlive a KeyboardInterrupt."""
        while self.watched or self.dead or self.report_job:
            time.sleep(self.profile.refresh_s)
            had_cells = bool(self.watched or self.dead)
            self._refresh()
            self.watcher.progress(self._standing())
            if had_cells and not (self.watched or self.dead) and self.report_job:
                self.watcher.event(f"waiting for the report, job {self.report_job}")
        return grid_status(self.results, self.grid)

    @property
    def folder(self) -> Path:
        """Where the jobs have their files."""
        return jobs_folder(self.results, self.grid)

    def _alive(self, jobs: Iterable[str | None]) -> list[str]:
        return [job for job in jobs if job in self.queue and self.queue[job].alive]

    def _send(self, cells: Sequence[Cell], profile: Profile, starts: dict[str, int] | None = None) -> None:
        """Submit the cells, and a report behind all that is open, instead of the one that waits."""
        for cell in cells:
            try:
                prepare(self.results, cell)
            except Locked:
                # Its job waits for whoever has it.
                self.watcher.event(f"{cell.run_name}: another process runs it now")
        submitter = Submitter(self.grid, self.results, profile, self.scoring)
        others = [job for entry in self.watched for job in self._alive(entry.jobs)]
        jobs = submitter.submit(cells, self.report, others)
        if self.report:
            if superseded := self._alive([self.report_job]):
                queue.cancel(superseded)
            (self.report_job,) = jobs["report"]
        for cell in cells:
            run = run_dir(self.results, cell)
            count = 1 + (starts or {}).get(run.name, 0)
            self.watched.append(_Watched(cell, run, jobs[run.name], starts=count, step=_step(run)))
        sent = [f"{len(one.jobs)} in job {one.jobs[0].partition('_')[0]}" for one in submitter.sent]
        if sent:
            self.watcher.event(f"submitted: {', '.join(sent)}")

    def _refresh(self) -> None:
        self.queue = queue.ask()
        open_ = [entry for entry in self.watched if not self._settle(entry)]
        self.watched = [entry for entry in open_ if self._lives(entry)]
        lost = [entry for entry in open_ if entry not in self.watched]
        ended = queue.last_states([entry.run for entry in lost], self.queue)
        for entry in lost:
            self._lost(entry, ended)
        self._send_again()
        self._score_kept()
        if self.report_job is not None and not self._alive([self.report_job]):
            how = self.queue.get(self.report_job, Job(ENDED)).state
            self.reported = how in ("COMPLETED", ENDED)
            where = f", {report_path(self.results, self.grid.name)}" if self.reported else ""
            self.watcher.event(f"report: {WORDS.get(how, how)}{where}")
            self.report_job = None

    def _settle(self, entry: _Watched) -> bool:
        if not is_finished(entry.run, entry.cell):
            return False
        status = cell_status(self.results, entry.cell)
        said = status.cause if status.state == "failed" else status.headline
        self.watcher.event(f"{status.state}: {status.run}: {said}")
        return True

    def _lives(self, entry: _Watched) -> bool:
        known = [self.queue[job] for job in entry.jobs if job in self.queue]
        return any(job.alive for job in known) or (not known and time.monotonic() - entry.since < GRACE_S)

    def _lost(self, entry: _Watched, ended: dict[str, Job]) -> None:
        """All jobs of a cell ended and it is not finished: another start, if it got further or was not to blame."""
        if is_finished(entry.run, entry.cell):  # finished between two looks
            self._settle(entry)
            return
        states = [(self.queue.get(job) or ended.get(job) or Job(ENDED)).state for job in entry.jobs]
        log = queue.log_of(entry.run)
        how = queue.of_memory(_how(states), log)
        said = WORDS.get(how, how.lower())
        if how == "CANCELLED":
            entry.run.set_state("pending", cause=said, eta_s=None)
            self.cancelled += 1
            self.watcher.event(f"cancelled: {entry.run.name}: left alone; the same command resumes")
            return
        if _step(entry.run) > entry.step:
            entry.starts = 0
        if entry.starts < MAX_STARTS and (how != "OUT_OF_MEMORY" or not entry.starts):
            self.watcher.event(f"cut: {entry.run.name}: {said}; submitting it again")
            self.dead.append(entry)
            return
        cause = queue.with_tail(f"Slurm job {entry.jobs[0]}: {said}", log)
        with entry.run.lock():
            set_failed(entry.run, cause, log=None if log is None else str(log))
        self.watcher.event(f"failed: {entry.run.name}: {cause}")

    def _send_again(self) -> None:
        """Submit cells whose jobs died, as far as the caps leave room beside the jobs there are."""
        room = self.profile.max_jobs - len(self.watched)
        if not self.dead or (self.watched and len(self.dead) > room):
            return
        again, self.dead = self.dead, []
        profile = _at_most(self.profile, room)
        self._send([entry.cell for entry in again], profile, {entry.run.name: entry.starts for entry in again})

    def _score_kept(self) -> None:
        """Submit what scores the checkpoints that cells keep while they train; training does not wait for it."""
        due = [entry.cell for entry in self.watched if self._is_due(entry.run)]
        room = self.profile.max_eval_jobs - len(self._alive(self.scorers.values()))
        if due and room > 0:
            submitter = Submitter(self.grid, self.results, self.profile, self.scoring)
            self.scorers |= submitter.score_kept(due, room)

    def _is_due(self, run: RunDir) -> bool:
        last = self.scorers.get(run.name)
        # Where one failed or was cancelled, what is kept is left to the scores of the end.
        may_follow = last is None or self.queue.get(last, Job(ENDED)).state in ("COMPLETED", ENDED)
        return may_follow and bool(background_scoring.retained_steps(run)) and not run.state().get("trained")

    def _standing(self) -> Standing:
        entries = self.watched + self.dead
        states = [(entry.run.name, entry.run.state()) for entry in entries]
        running = [
            (name, float(state.get("progress") or 0.0), state.get("eta_s"))
            for name, state in states
            if state["state"] == "running"
        ]
        return Standing(len(self.grid.cells), len(self.grid.cells) - len(entries) - self.cancelled, running)


def _at_most(profile: Profile, room: int) -> Profile:
    """The profile with at most `room` jobs of each kind at once."""
    caps = {"max_jobs": min(room, profile.max_jobs), "max_eval_jobs": min(room, profile.max_eval_jobs)}
    return profile.model_copy(update=caps)


def dry_run(grid: Grid, results: Path, profile: Profile, scoring: Scorer, report: bool) -> list[Path]:
    """Write the batch scripts that a sweep would send now to results/grids/<grid>/slurm-dry; gives their paths."""
    cells = [cell for cell in grid.cells if not is_finished(run_dir(results, cell), cell)]
    submitter = Submitter(grid, results, profile, scoring, dry=True)
    submitter.submit(cells, report)
    folder = results / GRIDS / grid.name / "slurm-dry"
    for old in folder.glob("*.sh"):
        old.unlink()
    return [_write(folder, number, one) for number, one in enumerate(submitter.sent, start=1)]


def _write(folder: Path, number: int, one: Submission) -> Path:
    path = folder / f"{number:03}.sh"
    write_text(path, one.script + "\n")
    return path


def cancel(results: Path, grid: Grid) -> list[str]:
    """Cancel the jobs of a grid that are alive; gives the runs they were of, and "report". Raises UserError."""
    runs = [run_dir(results, cell) for cell in grid.cells]
    jobs = {run.name: [facts["job"] for facts in queue.recorded_jobs(run).values()] for run in runs}
    report = queue.recorded_report(jobs_folder(results, grid))
    if report is None and not any(jobs.values()):
        return []
    known = queue.ask()
    jobs["report"] = [] if report is None else [report]
    alive = {name: [job for job in ids if job in known and known[job].alive] for name, ids in jobs.items()}
    doomed = [job for ids in alive.values() for job in ids]
    if doomed:
        queue.cancel(doomed)
        for run in runs:
            if alive[run.name]:
                queue.record_cancelled(run)
    return [name for name, ids in alive.items() if ids]


def _how(states: Sequence[str]) -> str:
    """How a cell's jobs ended, in a word: one that waited for one that died was cancelled with it."""
    bad = [state for state in states if state not in ("COMPLETED", "CANCELLED")]
    return bad[0] if bad else max(states, key=("COMPLETED", "CANCELLED").index)


def _step(run: RunDir) -> int:
    return max(steps_saved(run), default=0)
