"""Sweeps on a real Slurm (cluster.py starts one) leave the records of the local executor."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from slurm_jobs import (
    DENSE,
    LONG,
    PROFILE,
    UNSCORED,
    job_of,
    log_of,
    node_of,
    on_slurm,
    resume_nodes,
    slurm,
    start_on_slurm,
    until,
    urgent,
    write,
)
from sweep_processes import TINY, final_weights, records, runs_of, start_sweep, suite

from suite.grids import load_grid
from suite.plan import plan as planning
from suite.records import RunDir

GRIDS = Path(__file__).parents[2] / "grids"

pytestmark = pytest.mark.slurm


def stop_at_first_checkpoint(runs: list[RunDir]) -> dict[Path, int]:
    """Stop each training process at its first checkpoint, so that it is interrupted there on a machine of any speed."""
    stopped: dict[Path, int] = {}

    def all_stopped() -> bool:
        for run in runs:
            if run.path not in stopped and list(run.checkpoints.glob("step-*")):
                stopped[run.path] = run.state()["pid"]
                os.kill(stopped[run.path], signal.SIGSTOP)
        return len(stopped) == len(runs)

    until(all_stopped)
    assert not any(run.state().get("trained") for run in runs), "trained to its end before it could be stopped"
    return stopped


def is_still_stopped(process: int) -> bool:
    """Stop a process again, which Slurm continues in order to end it; False once it has ended."""
    try:
        os.kill(process, signal.SIGSTOP)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_warned(process: int) -> bool:
    """Whether the warning signal is pending for a stopped process, or the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    status = dict(line.split(":", 1) for line in lines)
    return bool((int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)) >> (signal.SIGUSR2 - 1) & 1)


def assert_equal_records(one: Path, other: Path) -> None:
    expected, actual = records(one), records(other)
    assert actual.keys() == expected.keys()
    for name, text in expected.items():
        assert actual[name] == text, name
    for run, tensors in final_weights(one).items():
        for name, tensor in final_weights(other)[run].items():
            assert (tensor == tensors[name]).all(), (run, name)


def test_an_array_leaves_the_records_of_the_local_executor_and_a_failing_cell_is_named(folder: Path) -> None:
    # Rows too short for the longest document: only this cell fails.
    text = TINY.replace("[dense, memory_plus]", "[memory_plus]")
    grid = write(folder, text + "  - axes: {model.family: [dense], data.seq_len: [9]}\n")
    done = on_slurm(grid, folder / "slurm", "--json")
    assert done.returncode == 1, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [cell["state"] for cell in cells] == ["done", "failed"]
    report = folder / "slurm" / "grids" / "tiny" / "report.md"
    assert f"report: completed, {report}\n" in done.stderr
    assert report.is_file()
    assert "data.seq_len: got 9" in cells[1]["cause"]
    assert cells[1]["cause"] in done.stderr
    assert Path(cells[1]["log"]).is_file()
    assert "Traceback" not in done.stderr
    suite("sweep", grid, "--results", folder / "local", "--no-report", cwd=folder)
    shutil.rmtree(folder / "local" / "runs" / cells[1]["run"] / "checkpoints", ignore_errors=True)
    failed = {name for name in records(folder / "local") if name.startswith(cells[1]["run"])}
    expected = {name: text for name, text in records(folder / "local").items() if name not in failed}
    actual = records(folder / "slurm")
    assert {name: actual[name] for name in expected} == expected
    assert actual.keys() == expected.keys() | failed
    again = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    assert again.returncode == 1
    assert "submitted" not in again.stderr


def test_records_after_requeue_time_limit_lost_node_and_kill_equal_those_of_an_undisturbed_sweep(
    folder: Path, ours: None
) -> None:
    # Slurm sends the warning up to half a minute late.
    (folder / "cpu.yaml").write_text(PROFILE.replace("time: 20, warning_s: 30", "time: 10, warning_s: 90"))
    grid = write(folder, LONG.replace("[dense]", "[dense], seed: [0, 1, 2, 3]"))
    results = folder / "slurm"
    launcher = start_on_slurm(grid, results)
    until(lambda: len(runs_of(results)) == 4)
    stopped = stop_at_first_checkpoint(runs_of(results))
    runs = sorted(runs_of(results), key=node_of)
    timed_out, killed = (run for run in runs if node_of(run) == node_of(runs[0]))
    requeued, lost = (run for run in runs if node_of(run) == node_of(runs[-1]))
    job = job_of(timed_out)
    slurm("scontrol", "update", f"JobId={job}", "EndTime=now+100")
    undisturbed = start_sweep(grid, folder / "local")
    slurm("scontrol", "requeue", job_of(requeued))
    os.kill(stopped[killed.path], signal.SIGKILL)
    until(lambda: not is_still_stopped(stopped[requeued.path]))
    slurm("scontrol", "update", f"NodeName={node_of(lost)}", "State=DOWN", "Reason=test")
    until(lambda: not is_still_stopped(stopped[lost.path]))
    until(lambda: is_warned(stopped[timed_out.path]))
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    with suppress(ProcessLookupError):  # Slurm may have continued it
        os.kill(stopped[timed_out.path], signal.SIGCONT)
    until(lambda: resume_nodes() or launcher.poll() is not None, 900)
    assert launcher.wait() == 0, (folder / "sweep.log").read_text()
    for run in runs:
        starts = [line for line in log_of(run).splitlines() if "training from step" in line]
        assert len(starts) > 1, run.name
        assert not starts[-1].endswith(" step 0"), run.name
    assert "timed-out" in log_of(timed_out)
    assert undisturbed.wait(timeout=900) == 0
    assert_equal_records(folder / "local", results)


def test_forty_cells_respect_the_limit_of_jobs_and_call_squeue_once_per_refresh(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = folder / "calls"
    (folder / "bin").mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo"):
        counted = folder / "bin" / name
        counted.write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {shutil.which(name)} "$@"\n')
        counted.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    (folder / "cpu.yaml").write_text(PROFILE.replace("max_jobs: 4", "max_jobs: 3").replace("1.5", "5"))
    number = int(os.environ.get("SLURM_CELLS", "40"))
    text = UNSCORED.replace("epochs: 8", "epochs: 0.5").replace("probes: 3", "probes: 0")
    grid = write(folder, text.replace("[dense]", f"[dense], seed: {list(range(number))}"))
    started = time.monotonic()
    done = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    refreshes = (time.monotonic() - started) / 5
    assert done.returncode == 0, done.stderr
    states = [run.state() for run in runs_of(folder / "slurm")]
    assert len(states) == number
    moments = sorted([(state["started"], 1) for state in states] + [(state["finished"], -1) for state in states])
    at_once = [sum(change for _, change in moments[: last + 1]) for last in range(len(moments))]
    assert max(at_once) <= 3
    called = calls.read_text().split()
    print(f"{number} cells in {refreshes * 5:.0f} s:", {name: called.count(name) for name in sorted(set(called))})
    assert called.count("sbatch") == 1
    assert called.count("squeue") <= refreshes + 1
    assert set(called) == {"sbatch", "squeue"}


@pytest.mark.slow
def test_checkpoints_are_scored_by_other_jobs_during_training(folder: Path) -> None:
    text = DENSE.replace("epochs: 8", "epochs: 120, evaluate_every: 50").replace("log_every: 1", "log_every: 20")
    grid = write(folder, text.replace("checkpoint_every: 2", "checkpoint_every: 50"))
    launcher = start_on_slurm(grid, folder / "slurm")
    until(lambda: any(list(run.path.glob("eval/steps/*.json")) for run in runs_of(folder / "slurm")))
    (run,) = runs_of(folder / "slurm")
    assert not run.state().get("trained")
    assert launcher.wait(timeout=900) == 0, (folder / "sweep.log").read_text()
    assert start_sweep(grid, folder / "local").wait(timeout=900) == 0
    assert_equal_records(folder / "local", folder / "slurm")
    assert len(list(run.path.glob("eval/steps/*.json"))) == run.train_lines()[-1]["step"] // 50


@pytest.mark.slow
def test_two_preempted_processes_save_together_and_resume(folder: Path, ours: None) -> None:
    (folder / "cpu.yaml").write_text(PROFILE.replace("{", "{processes: 2, memory_parallel: 2, score_together: true, "))
    text = TINY.replace("[dense, memory_plus]", "[memory_plus]").replace("epochs: 8", "epochs: 12")
    grid = write(folder, text.replace("checkpoint_every: 2", "checkpoint_every: 100000"))
    launcher = start_on_slurm(grid, folder / "slurm")
    until(lambda: any(len(run.train_lines()) > 5 for run in runs_of(folder / "slurm")))
    (run,) = runs_of(folder / "slurm")
    other = urgent(node_of(run), "sleep 600")
    until(lambda: "preempted: saved" in (run.state()["cause"] or ""))
    (status,) = json.loads(suite("status", grid, "--results", folder / "slurm", "--json", cwd=folder).stdout)["cells"]
    assert status["state"] == "pending"
    assert status["note"].startswith("preempted: saved; resumes when it is scheduled again, job ")
    slurm("scancel", other)
    assert launcher.wait(timeout=900) == 0, (folder / "sweep.log").read_text()
    resumed = [line for line in log_of(run).splitlines() if "training from step" in line]
    assert len(resumed) == 2
    # Only the warning led to a checkpoint, so this is the checkpoint of that step.
    assert not resumed[1].endswith(" step 0")
    assert start_on_slurm(grid, folder / "undisturbed").wait(timeout=900) == 0
    assert records(folder / "slurm") == records(folder / "undisturbed")


def test_status_shows_the_state_of_jobs_and_cancel_ends_them(folder: Path) -> None:
    grid = write(folder, LONG.replace("[dense]", "[dense], seed: [0, 1]").replace("epochs: 40", "epochs: 4000"))
    (folder / "cpu.yaml").write_text(PROFILE.replace("max_jobs: 4", "max_jobs: 1"))
    results = folder / "slurm"
    assert on_slurm(grid, results, "--no-wait").returncode == 0
    until(lambda: any(run.train_lines() for run in runs_of(results)))

    def statuses() -> list[dict[str, str]]:
        cells: list[dict[str, str]] = json.loads(
            suite("status", grid, "--results", results, "--json", cwd=folder).stdout
        )["cells"]
        return cells

    running, waiting = statuses()
    assert running["state"] == "running"
    assert running["note"].startswith("job ")
    assert waiting["state"] == "pending"
    assert "(JobArrayTaskLimit)" in waiting["note"]
    report_job = slurm("squeue", "--noheader", "--name=tiny-report", "--format=%T %r")
    assert report_job == "PENDING Dependency"
    second = on_slurm(grid, results, "--no-wait")
    assert "2 cells have jobs already" in second.stderr
    assert "submitted" not in second.stderr
    cancelled = suite("cancel", grid, "--results", results, "--json", cwd=folder)
    assert json.loads(cancelled.stdout)["cancelled"] == [*(run.name for run in runs_of(results)), "report"]
    until(lambda: not slurm("squeue", "--me", "--noheader"))
    for status in statuses():
        assert status["state"] == "pending"
        assert "cancelled; the same sweep resumes it" in status["note"]


def test_a_process_that_fails_repeatedly_fails_its_cell_with_slurms_state_and_the_end_of_the_log(folder: Path) -> None:
    grid = write(folder, DENSE)
    (folder / "cpu.yaml").write_text(PROFILE.replace("{", "{setup: [echo no module named cuda, exit 3], "))
    done = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    assert done.returncode == 1
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["state"] == "failed"
    assert "failed" in cell["cause"]
    assert "no module named cuda" in cell["cause"]
    (folder / "cpu.yaml").write_text(PROFILE)
    retried = on_slurm(grid, folder / "slurm", "--json", "--no-report", "--retry-failed")
    assert retried.returncode == 0, retried.stderr


def test_slurm_accepts_the_scripts_of_a_dry_run_of_an_8b_cell_with_16m_rows(folder: Path) -> None:
    if subprocess.run(["scontrol", "show", "partition", "gpu"], capture_output=True).returncode:
        pytest.skip("this Slurm has no partition `gpu`")
    (folder / "cpu.yaml").write_text("{partition: gpu, time: 1-00:00:00, gpus_per_node: 8, gpu: h100, mem_gb: 900}\n")
    text = (GRIDS / "paper-8b.yaml").read_text().replace("[dense, memory_plus]", "[memory_plus]")
    grid = write(folder, text)
    # Its HumanEval runs programs that the model writes; a dry run refuses what a sweep would refuse.
    done = on_slurm(grid, folder / "slurm", "--dry-run", "--json", "--run-code", "unshare")
    assert done.returncode == 0, done.stderr
    scripts = json.loads(done.stdout)["scripts"]
    assert len(scripts) == 3
    for script in scripts:
        checked = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, cwd=folder)
        assert checked.returncode == 0, checked.stderr
    loaded = load_grid(str(grid), need_data=False)
    for one in planning.plan(loaded, planning.assumptions("h100", None, 0.4, None), folder / "cache"):
        assert one.mesh is not None
        parts = one.mesh.memory
        assert parts.weights + parts.moments + parts.gradients + parts.activations <= 80e9
        # Neither training nor the weights alone fit on one GPU, so both stages get the same nodes.
        for script in scripts[:2]:
            text = (folder / script).read_text()
            assert "#SBATCH --array=0-1%2" in text
            assert f"#SBATCH --nodes={one.mesh.gpus // 8}" in text
            assert "#SBATCH --gpus-per-node=8" in text
