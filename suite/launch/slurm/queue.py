"""The state of our jobs in Slurm: one call for all of them, and how the jobs of a run ended.

The submitting process records a run's jobs in its logs/slurm.json; a job id is `ARRAY_INDEX` or a number.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from suite.atomic import write_json
from suite.errors import UserError
from suite.launch.status import CellStatus
from suite.records import RunDir, read_json

ALIVE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
    "SPECIAL_EXIT",
}
ENDED = "ended"
"""The state of a job that Slurm no longer knows."""
WORDS = {
    "TIMEOUT": "timed out",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "out of memory",
    "NODE_FAIL": "node failure",
    "CANCELLED": "cancelled",
    "BOOT_FAIL": "node failure at boot",
    "DEADLINE": "past its deadline",
    "FAILED": "failed",
    "COMPLETED": "completed",
    ENDED: "ended, and Slurm no longer knows how",
}
RESUMABLE = {"TIMEOUT", "PREEMPTED", "NODE_FAIL", "CANCELLED", "BOOT_FAIL", "COMPLETED", ENDED}
"""Ends of a job after which its cell can be resumed."""
TAIL_LINES = 5
MEMORY_KILL_LINES = 20
"""Slurm reports a memory kill some lines before the end of a log, in an order that differs between jobs."""
KILLED_FOR_MEMORY = ("oom-kill", "out of memory", "exceeded memory limit", "exceeded job memory limit")
"""What Slurm writes to the log of a job that it killed for its memory; the state of most of them is FAILED."""


@dataclass(frozen=True)
class Job:
    """A job: its state, why it waits, and its nodes."""

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def alive(self) -> bool:
        """Whether it runs or will run."""
        return self.state in ALIVE


def query() -> dict[str, Job]:
    """Return every job of this user in the queue, array elements separately, in one call. Raises UserError."""
    lines = _call("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N").splitlines()
    fields = (line.split("|", 3) for line in lines if line.count("|") >= 3)
    return {job: Job(state, reason, nodes) for job, state, reason, nodes in fields}


def query_ended(jobs: Iterable[str]) -> dict[str, Job]:
    """Return the last states of jobs that have left the queue, in one call; unknown on a cluster without accounting."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    command = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        "--format=JobID,State",
        f"--jobs={','.join(wanted)}",
    ]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("sacct") else None
    lines = done.stdout.splitlines() if done is not None and done.returncode == 0 else []
    states = dict(line.split("|")[:2] for line in lines if "|" in line)
    # "CANCELLED by 1000" is CANCELLED.
    return {job: Job(states[job].split()[0] if states.get(job) else ENDED) for job in wanted}


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs, in one call. Raises UserError."""
    _call("scancel", *sorted(set(jobs)))


def has_slurm() -> bool:
    """Return whether this machine has Slurm."""
    return shutil.which("squeue") is not None


def require_commands() -> None:
    """Raise UserError if a command for submitting or watching jobs is not installed here."""
    for command in ("sbatch", "srun", "squeue"):
        if shutil.which(command) is None:
            raise UserError(
                f"--executor slurm: there is no {command} on this machine; run the command on a node that submits to "
                "Slurm, or use --executor local"
            )


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine; run the command on a node that submits to Slurm"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise UserError(f"{command[0]}: {lines[-1]}") from None


def record_job(run: RunDir, stage: str, job: str, log: Path) -> None:
    """Record the job of a stage of a run.

    Args:
        run: The run.
        stage: The stage that the job runs.
        job: The job's id.
        log: The file with the job's output.
    """
    write_json(run.jobs_path, run.jobs() | {stage: {"job": job, "log": str(log)}})


def record_report(folder: Path, job: str, log: Path) -> None:
    """Record the newest report job of a grid.

    Args:
        folder: The folder of the grid's job files.
        job: The job's id.
        log: The file with the job's output.
    """
    write_json(folder / "report.json", {"job": job, "log": str(log)})


def recorded_report(folder: Path) -> str | None:
    """Return the newest report job; None before the first."""
    try:
        return str(read_json(folder / "report.json", "delete the file")["job"])
    except FileNotFoundError:
        return None


def record_cancelled(run: RunDir) -> None:
    """Record that we cancelled the run's jobs: Slurm may not report those that never ran."""
    write_json(run.jobs_path, {stage: facts | {"cancelled": True} for stage, facts in run.jobs().items()})


def last_states(runs: Iterable[RunDir], queue: dict[str, Job]) -> dict[str, Job]:
    """Return how the jobs that left the queue ended, from our record of cancelled jobs, otherwise from accounting."""
    gone = [(facts["job"], facts) for run in runs for facts in run.jobs().values() if facts["job"] not in queue]
    ours = {job: Job("CANCELLED") for job, facts in gone if facts.get("cancelled")}
    return ours | query_ended(job for job, _ in gone if job not in ours)


def job_ids(run: RunDir) -> list[str]:
    """Return the jobs that train and evaluate the run, training first."""
    return [facts["job"] for stage, facts in run.jobs().items() if stage != "score"]


def seen(jobs: Iterable[str], queue: dict[str, Job]) -> list[tuple[str, Job]]:
    """Return those of the jobs that are in the queue."""
    return [(job, queue[job]) for job in jobs if job in queue]


def with_slurm(statuses: list[CellStatus], runs: list[RunDir]) -> list[CellStatus]:
    """Add the state of the jobs to cells that are not finished: one call of squeue, and at most one of sacct.

    sacct is called, for all jobs at once, if any job left the queue without finishing its cell.
    """
    unfinished = {status.run for status in statuses if status.state not in ("done", "failed")}
    jobs = {run.name: job_ids(run) for run in runs if run.name in unfinished}
    open_ = {name for name, ids in jobs.items() if ids}
    if not open_ or not has_slurm():
        return statuses
    queue = query()
    queue |= last_states([run for run in runs if run.name in open_], queue)
    updated = []
    for status, run in zip(statuses, runs, strict=True):
        updated.append(_with_jobs(status, run, seen(jobs[run.name], queue)) if status.run in open_ else status)
    return updated


def _with_jobs(status: CellStatus, run: RunDir, jobs: list[tuple[str, Job]]) -> CellStatus:
    alive = [(job, facts) for job, facts in jobs if facts.alive]
    if alive:
        job, facts = alive[0]
        if facts.state == "RUNNING":
            note = f"job {job} on {facts.nodes}"
            # A lock may not be visible from another machine.
            return replace(status, state="running", note=note, eta_s=run.state().get("eta_s"))
        note = f"job {job} {facts.state.lower()}" + (f" ({facts.reason})" if facts.reason not in ("", "None") else "")
        return replace(status, state="pending", note=", ".join(filter(None, (status.note, note))))
    job, facts = jobs[-1]
    log = log_of(run)
    end = with_memory_kills(facts.state, log)
    cause = f"job {job}: {WORDS.get(end, end.lower())}"
    if status.state == "running":
        return status
    if end in RESUMABLE:
        return replace(status, note=f"{cause}; the same sweep resumes it")
    return replace(status, state="failed", cause=with_tail(cause, log), note=None, log=str(log or ""))


def log_of(run: RunDir) -> Path | None:
    """Return the log of the run's newest job."""
    logs = [Path(facts["log"]) for facts in run.jobs().values()]
    written = [log for log in logs if log.exists()]
    return max(written, key=lambda log: log.stat().st_mtime, default=None)


def with_memory_kills(state: str, log: Path | None) -> str:
    """Return the state; OUT_OF_MEMORY instead of FAILED if the log ends with Slurm's message about a memory kill."""
    end = " ".join(_last_lines(log, MEMORY_KILL_LINES)).lower()
    return "OUT_OF_MEMORY" if state == "FAILED" and any(text in end for text in KILLED_FOR_MEMORY) else state


def with_tail(cause: str, log: Path | None) -> str:
    """Return the cause, followed by the last lines of the log."""
    last = _last_lines(log)
    return f"{cause}; its last lines: {' / '.join(last)}" if last else cause


def _last_lines(log: Path | None, count: int = TAIL_LINES) -> list[str]:
    if log is None:
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()][-count:]
