"""How jobs wait, run and end, as status tells it: jobs of plain shell, recorded as those of cells."""

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
HUNGRY = "srun --overlap python3 -c 'import time; x = bytearray(300_000_000); time.sleep(60)'"
FORGETFUL = f"""#!/bin/sh
# A squeue that soon forgets: the states of jobs that have ended are not in the queue.
exec {SQUEUE} $(printf '%s\\n' "$@" | grep -v -- --states=all)
"""
ACCOUNTING = f"""#!/bin/sh
# The answers of sacct on a cluster that keeps accounts, out of the memory of slurmctld.
for argument; do case $argument in --jobs=*) jobs=${{argument#--jobs=}} ;; esac; done
exec {SQUEUE} --noheader --array --states=all --format='%i|%T' --job="$jobs"
"""


def submit(run: RunDir, *how: str) -> str:
    """A job that is taken for the run's training."""
    log = run.path / "logs" / "job.out"
    log.parent.mkdir(exist_ok=True)
    command = ["sbatch", "--parsable", f"--output={log}", "--open-mode=append", "--job-name=tiny-train"]
    job = slurm(*command, *how)
    queue.record_job(run, "train", job, log)
    return job


def state(job: str) -> str:
    return slurm("squeue", "--noheader", "--states=all", "--format=%T", "--job", job)


def words(statuses: Sequence[CellStatus]) -> list[str]:
    return [f"{status.state}: {status.cause or status.note}" for status in statuses]


def instead(folder: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put programs before Slurm's own."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_status_tells_every_way_a_job_waits_runs_and_ends_in_one_question(
    folder: Path, ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, DENSE.replace("[dense]", f"[dense], seed: {list(range(8))}"))
    results, grid = folder / "results", load_grid(str(path))
    runs = [prepare(results, cell) for cell in grid.cells]
    waits, hungry, fails, node_lost, preempted, cancelled, timed_out, runs_on = runs
    first, second = slurm("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N").split()
    limited = submit(timed_out, f"--nodelist={second}", "--wrap=sleep 600")
    until(lambda: state(limited) == "RUNNING")
    slurm("scontrol", "update", f"JobId={limited}", "EndTime=now")
    waiting = submit(waits, "--begin=now+1hour", "--wrap=true")
    eats = submit(hungry, "--mem=150", f"--wrap={HUNGRY}")
    failing = submit(fails, "--wrap=echo no module named cuda; exit 3")
    until(lambda: state(eats) == state(failing) == "FAILED")
    lost = submit(node_lost, "--no-requeue", f"--nodelist={first}", "--wrap=sleep 600")
    until(lambda: state(lost) == "RUNNING")
    slurm("scontrol", "update", f"NodeName={first}", "State=DOWN", "Reason=test")
    until(lambda: state(lost) == "NODE_FAIL")
    until(lambda: resume_nodes() or not slurm("sinfo", "--noheader", "--states=down,drain", "--format=%N"))
    away = submit(preempted, "--partition=spare", f"--nodelist={first}", "--wrap=sleep 600")
    until(lambda: state(away) == "RUNNING")
    urgent(first, "true")
    until(lambda: state(away) == "PREEMPTED")
    called_off = submit(cancelled, "--wrap=sleep 600")
    slurm("scancel", called_off)
    running = submit(runs_on, "--wrap=sleep 600")
    until(lambda: state(running) == "RUNNING" and state(limited) == "TIMEOUT" and state(called_off) == "CANCELLED")

    expected = [
        f"pending: job {waiting} pending (BeginTime)",
        f"failed: job {eats}: out of memory; its last lines: ",
        f"failed: job {failing}: failed; its last lines: no module named cuda",
        f"pending: job {lost}: node failure; the same sweep resumes it",
        f"pending: job {away}: preempted; the same sweep resumes it",
        f"pending: job {called_off}: cancelled; the same sweep resumes it",
        f"pending: job {limited}: timed out; the same sweep resumes it",
        f"running: job {running} on 127.0.0.",
    ]

    def said() -> list[str]:
        return words(queue.with_slurm(grid_status(results, grid), runs))

    # Calls are counted where people ask.
    calls = folder / "calls"
    count = '#!/bin/sh\necho {0} >> {1}\nexec {2} "$@"\n'
    programs = ("squeue", "sacct", "scontrol", "sinfo")
    with monkeypatch.context() as counted:
        instead(folder / "count", {name: count.format(name, calls, shutil.which(name)) for name in programs}, counted)
        shown = json.loads(suite("status", path, "--results", results, "--json", cwd=folder).stdout)["cells"]
    told = [f"{cell['state']}: {cell['cause'] or cell['note']}" for cell in shown]
    assert all(one.startswith(start) for one, start in zip(told, expected, strict=True)), told
    assert calls.read_text().split() == ["squeue"]

    # A queue that has forgotten, and accounting that has not: the same words.
    with monkeypatch.context() as accounted:
        instead(folder / "accounts", {"squeue": FORGETFUL, "sacct": ACCOUNTING}, accounted)
        assert said() == told
    # The real sacct where no accounts are kept: of jobs that have left nothing is known, nor held against their cells.
    with monkeypatch.context() as forgotten:
        instead(folder / "none", {"squeue": FORGETFUL}, forgotten)
        gone = "ended, and Slurm no longer knows how; the same sweep resumes it"
        jobs = (eats, failing, lost, away, called_off, limited)
        assert said() == [told[0], *(f"pending: job {job}: {gone}" for job in jobs), told[7]]
    slurm("scancel", waiting, running)


@pytest.mark.slow
def test_a_cell_that_needs_more_memory_than_it_asked_for_fails_as_such_and_is_retried_with_more(folder: Path) -> None:
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
