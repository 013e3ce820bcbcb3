"""What `suite status` shows of jobs that wait, run or ended: shell jobs that are recorded as those of cells."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from slurm_jobs import DENSE, on_slurm, resume_nodes, slurm, until, urgent, write
from sweep_processes import suite

from suite.grids import load_grid
from suite.launch.preparation import prepare
from suite.launch.slurm import queue
from suite.launch.status import CellStatus, grid_status
from suite.records import RunDir

pytestmark = pytest.mark.slurm

SQUEUE = shutil.which("squeue")
USES_MEMORY = "srun --overlap python3 -c 'import time; x = bytearray(300_000_000); time.sleep(60)'"
WITHOUT_ENDED_JOBS = f"""#!/bin/sh
# A squeue that does not list jobs that have ended.
exec {SQUEUE} $(printf '%s\\n' "$@" | grep -v -- --states=all)
"""
ACCOUNTING = f"""#!/bin/sh
# The output of sacct on a cluster with accounting, taken from slurmctld.
for argument; do case $argument in --jobs=*) jobs=${{argument#--jobs=}} ;; esac; done
exec {SQUEUE} --noheader --array --states=all --format='%i|%T' --job="$jobs"
"""


def submit(run: RunDir, *options: str) -> str:
    """Submit a job that is recorded as the run's training."""
    log = run.path / "logs" / "job.out"
    log.parent.mkdir(exist_ok=True)
    command = ["sbatch", "--parsable", f"--output={log}", "--open-mode=append", "--job-name=tiny-train"]
    job = slurm(*command, *options)
    queue.record_job(run, "train", job, log)
    return job


def state(job: str) -> str:
    return slurm("squeue", "--noheader", "--states=all", "--format=%T", "--job", job)


def state_and_cause(statuses: Sequence[CellStatus]) -> list[str]:
    return [f"{status.state}: {status.cause or status.note}" for status in statuses]


def replace_programs(folder: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put programs before those of Slurm on the PATH."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_status_shows_waiting_running_and_ended_jobs_with_one_call_of_squeue(
    folder: Path, ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, DENSE.replace("[dense]", f"[dense], seed: {list(range(8))}"))
    results, grid = folder / "results", load_grid(str(path))
    runs = [prepare(results, cell) for cell in grid.cells]
    waits, exceeds_memory, fails, node_lost, preempted, cancelled, timed_out, runs_on = runs
    first, second = slurm("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N").split()
    limited = submit(timed_out, f"--nodelist={second}", "--wrap=sleep 600")
    until(lambda: state(limited) == "RUNNING")
    slurm("scontrol", "update", f"JobId={limited}", "EndTime=now")
    waiting = submit(waits, "--begin=now+1hour", "--wrap=true")
    over_memory = submit(exceeds_memory, "--mem=150", f"--wrap={USES_MEMORY}")
    failing = submit(fails, "--wrap=echo no module named cuda; exit 3")
    until(lambda: state(over_memory) == state(failing) == "FAILED")
    lost = submit(node_lost, "--no-requeue", f"--nodelist={first}", "--wrap=sleep 600")
    until(lambda: state(lost) == "RUNNING")
    slurm("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=test")
    until(lambda: state(lost) == "NODE_FAIL")
    until(lambda: resume_nodes() or not slurm("sinfo", "--noheader", "--states=down,drain", "--format=%N"))
    preempted_job = submit(preempted, "--partition=spare", f"--nodelist={first}", "--wrap=sleep 600")
    until(lambda: state(preempted_job) == "RUNNING")
    urgent(first, "true")
    until(lambda: state(preempted_job) == "PREEMPTED")
    cancelled_job = submit(cancelled, "--wrap=sleep 600")
    slurm("scancel", cancelled_job)
    running = submit(runs_on, "--wrap=sleep 600")
    until(lambda: state(running) == "RUNNING" and state(limited) == "TIMEOUT" and state(cancelled_job) == "CANCELLED")

    expected = [
        f"pending: job {waiting} pending (BeginTime)",
        f"failed: job {over_memory}: out of memory; its last lines: ",
        f"failed: job {failing}: failed; its last lines: no module named cuda",
        f"pending: job {lost}: node failure; the same sweep resumes it",
        f"pending: job {preempted_job}: preempted; the same sweep resumes it",
        f"pending: job {cancelled_job}: cancelled; the same sweep resumes it",
        f"pending: job {limited}: timed out; the same sweep resumes it",
        f"running: job {running} on 127.0.0.",
    ]

    def actual() -> list[str]:
        return state_and_cause(queue.with_slurm(grid_status(results, grid), runs))

    # Count the calls of the command line.
    calls = folder / "calls"
    count = '#!/bin/sh\necho {0} >> {1}\nexec {2} "$@"\n'
    programs = ("squeue", "sacct", "scontrol", "sinfo")
    with monkeypatch.context() as counted:
        replace_programs(
            folder / "count", {name: count.format(name, calls, shutil.which(name)) for name in programs}, counted
        )
        shown = json.loads(suite("status", path, "--results", results, "--json", cwd=folder).stdout)["cells"]
    shown_states = [f"{cell['state']}: {cell['cause'] or cell['note']}" for cell in shown]
    assert all(one.startswith(start) for one, start in zip(shown_states, expected, strict=True)), shown_states
    assert calls.read_text().split() == ["squeue"]

    # The queue no longer lists ended jobs, but accounting does: the same states.
    with monkeypatch.context() as accounted:
        replace_programs(folder / "accounts", {"squeue": WITHOUT_ENDED_JOBS, "sacct": ACCOUNTING}, accounted)
        assert actual() == shown_states
    # The real sacct, without accounting: the end of jobs is unknown, and their cells do not fail.
    with monkeypatch.context() as forgotten:
        replace_programs(folder / "none", {"squeue": WITHOUT_ENDED_JOBS}, forgotten)
        gone = "ended, and Slurm no longer knows how; the same sweep resumes it"
        jobs = (over_memory, failing, lost, preempted_job, cancelled_job, limited)
        assert actual() == [shown_states[0], *(f"pending: job {job}: {gone}" for job in jobs), shown_states[7]]
    slurm("scancel", waiting, running)


@pytest.mark.slow
def test_a_cell_that_exceeds_its_memory_limit_fails_with_that_cause_and_can_be_retried_with_more(folder: Path) -> None:
    grid = write(folder, DENSE)
    profile = (folder / "cpu.yaml").read_text()
    (folder / "cpu.yaml").write_text(profile.replace("{", "{mem_gb: 0.2, "))
    done = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    assert done.returncode == 1
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["state"] == "failed"
    assert ": out of memory; its last lines: " in cell["cause"]
    (folder / "cpu.yaml").write_text(profile.replace("{", "{mem_gb: 3, "))
    again = on_slurm(grid, folder / "slurm", "--json", "--no-report", "--retry-failed")
    assert again.returncode == 0, again.stderr
