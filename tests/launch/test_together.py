"""Several processes train one cell: the first holds the lock and writes the records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_disk import small_disk
from sweep_processes import environment, suite
from tiny_cells import tiny_cell

from suite.cells import Cell
from suite.launch.interruption import Interruption
from suite.launch.preparation import prepare
from suite.launch.worker import run_cell, run_cell_together
from suite.records import RunDir
from suite.train.parallel import World

ROOT = Path(__file__).parents[2]


def test_one_process_together_trains_as_alone(tmp_path: Path) -> None:
    cell = tiny_cell("memory_plus")
    alone, together = prepare(tmp_path / "alone", cell), prepare(tmp_path / "together", cell)
    assert run_cell(alone.path) == "done"
    with together.lock():
        assert run_cell_together(together.path, World()) == "locked"
    interruption = Interruption()
    interruption.requested = True
    with pytest.raises(KeyboardInterrupt):
        run_cell_together(together.path, World(), interruption=interruption)
    assert together.state()["state"] == "pending"
    assert run_cell_together(together.path, World()) == "done"
    assert run_cell_together(together.path, World()) == "done"
    losses = [[line["loss"] for line in run.train_lines() if "loss" in line] for run in (alone, together)]
    assert losses[0] == losses[1]


def test_a_failure_is_recorded_and_raised(tmp_path: Path) -> None:
    run = prepare(tmp_path, tiny_cell(warmup=1000))
    with pytest.raises(Exception, match=r"train\.warmup: got 1000"):
        run_cell_together(run.path, World())
    assert "train.warmup: got 1000" in run.state()["cause"]
    assert run_cell_together(run.path, World()) == "failed"


def test_another_process_records_a_failure_only_while_the_first_is_alive(tmp_path: Path) -> None:
    run = prepare(tmp_path, tiny_cell())
    run.set_state("running")
    with pytest.raises(Exception, match="cannot be divided"):
        run_cell_together(run.path, World(rank=1))
    assert run.state()["state"] == "running", "without a lock: pending"
    with run.lock(), pytest.raises(Exception, match="cannot be divided"):
        run_cell_together(run.path, World(rank=1))
    assert "cannot be divided" in run.state()["cause"]


def torchrun(cell: Path, results: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "suite"]
    arguments = ["train", str(cell), "--results", str(results), "--json"]
    return subprocess.Popen(
        [*command, *arguments], env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def write(cell: Cell, folder: Path) -> Path:
    path = folder / "cell.json"
    path.write_text(json.dumps({"cell": cell.model_dump(mode="json")}))
    return path


@pytest.mark.slow
def test_torchrun_trains_a_cell_with_the_losses_of_one_process(tmp_path: Path) -> None:
    path = write(tiny_cell("memory_plus"), tmp_path)
    job = torchrun(path, tmp_path / "two")
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    (status,) = json.loads(out)["cells"]
    assert status["state"] == "done"
    assert suite("train", path, "--results", tmp_path / "one", cwd=tmp_path).returncode == 0
    runs = [RunDir(tmp_path / name / "runs" / status["run"]) for name in ("one", "two")]
    losses = [[line["loss"] for line in run.train_lines() if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.slow
def test_torchrun_saves_when_it_is_terminated_and_resumes(tmp_path: Path) -> None:
    path = write(tiny_cell("dense", epochs=400.0, checkpoint_every=10_000), tmp_path)
    job = torchrun(path, tmp_path)
    deadline = time.monotonic() + 300
    while not (runs := [*tmp_path.glob("runs/*/train.jsonl")]) or not runs[0].read_text().count("\n") > 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)
    job.communicate(timeout=300)
    run = RunDir(runs[0].parent)
    assert run.state()["state"] == "pending"
    (saved,) = run.checkpoints.glob("step-*")
    assert int(saved.name.removeprefix("step-")) >= 3


@pytest.mark.slow
def test_torchrun_stops_at_a_full_disk_and_resumes(tmp_path: Path) -> None:
    path = write(tiny_cell("memory_plus", checkpoint_every=2), tmp_path)
    with small_disk(60_000):
        job = torchrun(path, tmp_path)
        _, err = job.communicate(timeout=600)
    assert job.returncode != 0
    (run,) = (RunDir(folder) for folder in tmp_path.glob("runs/*"))
    assert err.count(f"suite: {run.checkpoints / 'step-2'}: cannot be written: process ") == 2, err
    assert run.state()["state"] == "pending"
    assert "File too large" in run.state()["cause"]
    assert list(run.checkpoints.iterdir()) == []
    done = torchrun(path, tmp_path)
    _, err = done.communicate(timeout=600)
    assert done.returncode == 0, err
    assert run.state()["state"] == "done"


@pytest.mark.slow
def test_torchrun_refuses_a_batch_that_two_processes_do_not_divide(tmp_path: Path) -> None:
    job = torchrun(write(tiny_cell(batch_rows=3), tmp_path), tmp_path)
    _, err = job.communicate(timeout=300)
    assert job.returncode != 0
    assert "train.batch_rows: got 3, allowed: a multiple of accumulate x processes = 1 x 2" in err
