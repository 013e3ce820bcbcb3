"""Sweeps on the Slurm that answers `sinfo` (cluster.py starts one): the records are those of the local executor."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sweeps import TINY, final_weights, records, runs_of, start_sweep, suite

from suite.records import RunDir

GRIDS = Path(__file__).parents[2] / "grids"
PROFILE = "{time: 20, warning_s: 30, max_jobs: 4, max_eval_jobs: 4, refresh_s: 1.5}\n"
DENSE = TINY.replace("[dense, memory_plus]", "[dense]")
LONG = DENSE.replace("epochs: 8", "epochs: 120").replace("log_every: 1", "log_every: 20")
LONG = LONG.replace("checkpoint_every: 2", "checkpoint_every: 50")


def slurm_answers() -> bool:
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers sinfo (tests/slurm/cluster.py starts one)"),
]


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a profile; whatever a test leaves in the queue is cancelled."""
    (tmp_path / "cpu.yaml").write_text(PROFILE)
    yield tmp_path
    for stage in ("train", "evaluate", "report"):
        subprocess.run(["scancel", "--me", f"--name=tiny-{stage}"], capture_output=True)


def write(folder: Path, text: str, name: str = "tiny") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def on_slurm(grid: Path, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = grid.parent / "cpu.yaml"
    return suite(
        "sweep", grid, "--results", results, "--executor", "slurm", "--profile", profile, *options, cwd=grid.parent
    )  # fmt: skip


def start_on_slurm(grid: Path, results: Path) -> subprocess.Popen[str]:
    return start_sweep(grid, results, "--executor", "slurm", "--profile", str(grid.parent / "cpu.yaml"))


def until(what: Callable[[], object], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def job_of(run: RunDir, stage: str = "train") -> str:
    return str(json.loads((run.path / "logs" / "slurm.json").read_text())[stage]["job"])


def log_of(run: RunDir) -> str:
    return Path(json.loads((run.path / "logs" / "slurm.json").read_text())["train"]["log"]).read_text()


def resume_nodes() -> None:
    """What an operator does: a node that was lost is drained when it is found to still run what it was lost with."""
    for node in slurm("sinfo", "--noheader", "--Node", "--states=down,drain", "--format=%N").split():
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], capture_output=True)
    time.sleep(1)


def assert_equal_records(one: Path, other: Path) -> None:
    expected, found = records(one), records(other)
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert found[name] == text, name
    for run, tensors in final_weights(one).items():
        for name, tensor in final_weights(other)[run].items():
            assert (tensor == tensors[name]).all(), (run, name)


def test_an_array_leaves_the_records_of_the_local_executor_and_a_failing_cell_is_named(folder: Path) -> None:
    # Rows too short for the longest document: that cell fails by itself.
    grid = write(folder, TINY + "  - axes: {model.family: [dense], data.seq_len: [9]}\n")
    done = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    assert done.returncode == 1, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [cell["state"] for cell in cells] == ["done", "done", "failed"]
    assert "data.seq_len: got 9" in cells[2]["cause"]
    assert cells[2]["cause"] in done.stderr
    assert Path(cells[2]["log"]).is_file()
    assert "Traceback" not in done.stderr
    suite("sweep", grid, "--results", folder / "local", "--no-report", cwd=folder)
    shutil.rmtree(folder / "local" / "runs" / cells[2]["run"] / "checkpoints", ignore_errors=True)
    failed = {name for name in records(folder / "local") if name.startswith(cells[2]["run"])}
    expected = {name: text for name, text in records(folder / "local").items() if name not in failed}
    found = records(folder / "slurm")
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == expected.keys() | failed
    again = on_slurm(grid, folder / "slurm", "--json", "--no-report")
    assert again.returncode == 1
    assert "submitted" not in again.stderr


def test_cut_by_requeue_time_limit_lost_node_and_kill_records_are_those_of_an_unbroken_sweep(folder: Path) -> None:
    (folder / "cpu.yaml").write_text(PROFILE.replace("time: 20, warning_s: 30", "time: 1, warning_s: 20"))
    grid = write(folder, LONG.replace("[dense]", "[dense], seed: [0, 1, 2, 3]"))
    launcher = start_on_slurm(grid, folder / "slurm")
    runs = folder / "slurm"
    until(lambda: len(runs_of(runs)) == 4 and all(list(run.checkpoints.glob("step-*")) for run in runs_of(runs)))
    _, requeued, struck, lost = runs_of(runs)  # and the first meets its time limit alone, as they all do
    slurm("scontrol", "requeue", job_of(requeued))
    os.kill(struck.state()["pid"], signal.SIGKILL)
    node = slurm("squeue", "--noheader", "--format=%N", "--job", job_of(lost)).strip()
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    until(lambda: resume_nodes() or launcher.poll() is not None, 300)
    assert launcher.wait(timeout=420) == 0, (folder / "sweep.log").read_text()
    for run in runs_of(runs):
        starts = [line for line in log_of(run).splitlines() if "training from step" in line]
        assert len(starts) > 1, run.name
        assert not starts[-1].endswith(" step 0"), run.name
    assert any("timed-out" in log_of(run) for run in runs_of(runs))
    assert start_sweep(grid, folder / "local").wait(timeout=420) == 0
    assert_equal_records(folder / "local", runs)


def test_forty_cells_respect_the_cap_and_ask_slurm_once_a_refresh(
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
    text = DENSE.replace("  evaluate: [{tasks: [bios_storage], limit: 20}]\n", "").replace("epochs: 8", "epochs: 0.5")
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
    said = calls.read_text().split()
    print(f"{number} cells in {refreshes * 5:.0f} s:", {name: said.count(name) for name in sorted(set(said))})
    assert said.count("sbatch") == 1
    assert said.count("squeue") <= refreshes + 1
    assert set(said) == {"sbatch", "squeue"}


def test_two_processes_warned_together_save_together_and_go_on(folder: Path) -> None:
    (folder / "cpu.yaml").write_text(PROFILE.replace("{", "{processes: 2, memory_parallel: 2, "))
    text = TINY.replace("[dense, memory_plus]", "[memory_plus]").replace("epochs: 8", "epochs: 20")
    grid = write(folder, text.replace("checkpoint_every: 2", "checkpoint_every: 100000"))
    launcher = start_on_slurm(grid, folder / "slurm")
    until(lambda: any(len(run.train_lines()) > 5 for run in runs_of(folder / "slurm")))
    (run,) = runs_of(folder / "slurm")
    slurm("scancel", "--signal=USR2", job_of(run))
    assert launcher.wait(timeout=300) == 0, (folder / "sweep.log").read_text()
    resumed = [line for line in log_of(run).splitlines() if "training from step" in line]
    assert len(resumed) == 2
    # Nothing was saved but on the warning: nothing but that step's checkpoint can be behind this.
    assert not resumed[1].endswith(" step 0")
    assert start_on_slurm(grid, folder / "unbroken").wait(timeout=300) == 0
    assert records(folder / "slurm") == records(folder / "unbroken")


def test_status_tells_what_slurm_says_and_cancel_ends_it(folder: Path) -> None:
    grid = write(folder, LONG.replace("[dense]", "[dense], seed: [0, 1]").replace("epochs: 120", "epochs: 4000"))
    (folder / "cpu.yaml").write_text(PROFILE.replace("max_jobs: 4", "max_jobs: 1"))
    results = folder / "slurm"
    assert on_slurm(grid, results, "--no-wait", "--no-report").returncode == 0
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
    twice = on_slurm(grid, results, "--no-wait", "--no-report")
    assert "2 cells have jobs already" in twice.stderr
    assert "submitted" not in twice.stderr
    cancelled = suite("cancel", grid, "--results", results, "--json", cwd=folder)
    assert len(json.loads(cancelled.stdout)["cancelled"]) == 2
    until(lambda: not slurm("squeue", "--me", "--noheader"))
    for status in statuses():
        assert status["state"] == "pending"
        assert "cancelled; the same sweep resumes it" in status["note"]


def test_a_process_that_dies_again_and_again_fails_with_slurms_word_and_the_logs_last_lines(folder: Path) -> None:
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


def test_slurm_accepts_the_scripts_of_a_dry_launch_of_an_8b_cell_with_16m_rows(folder: Path) -> None:
    if subprocess.run(["scontrol", "show", "partition", "gpu"], capture_output=True).returncode:
        pytest.skip("this Slurm has no partition `gpu`")
    (folder / "cpu.yaml").write_text("{partition: gpu, time: 1-00:00:00, gpus_per_node: 8, gpu: h100, mem_gb: 900}\n")
    text = (GRIDS / "paper-8b.yaml").read_text().replace("[dense, memory_plus]", "[memory_plus]")
    grid = write(folder, text)
    done = on_slurm(grid, folder / "slurm", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    scripts = json.loads(done.stdout)["scripts"]
    assert len(scripts) == 3
    for script in scripts:
        answer = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, cwd=folder)
        assert answer.returncode == 0, answer.stderr
    training = (folder / scripts[0]).read_text()
    assert "#SBATCH --array=0-1%2" in training
    assert "#SBATCH --gpus-per-node=8" in training
