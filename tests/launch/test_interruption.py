"""Ctrl-C and SIGTERM: the first ends the step and saves, the second stops at once, and the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_processes import TINY, environment, records, runs_of, start_sweep, state_of

from suite.launch.interruption import Interruption
from suite.launch.worker import attempt
from suite.records import RunDir

GRID = TINY.replace("[dense, memory_plus]", "[dense]").replace("epochs: 8", "epochs: 30")
RARELY_SAVED = GRID.replace("checkpoint_every: 2", "checkpoint_every: 1000")

Interrupt = Callable[[subprocess.Popen[str]], None]


def wait_until(condition: Callable[[], object], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def write(folder: Path, text: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def has_trained(results: Path, steps: int = 5) -> bool:
    return any(len(run.train_lines()) >= steps for run in runs_of(results))


def of_runs(files: dict[str, str]) -> dict[str, str]:
    """The files without grid.json, which contains the path of the grid's file."""
    return {name: text for name, text in files.items() if not name.startswith("grids/")}


def ctrl_c(sweep: subprocess.Popen[str]) -> None:
    os.killpg(sweep.pid, signal.SIGINT)


def terminate(sweep: subprocess.Popen[str]) -> None:
    os.kill(sweep.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The records of a sweep that was not interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start_sweep(write(folder, RARELY_SAVED), folder / "results").wait(timeout=300) == 0
    return records(folder / "results")


@pytest.mark.parametrize("interrupt", [ctrl_c, pytest.param(terminate, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_saves_its_step_and_resumes_from_it(
    tmp_path: Path, interrupt: Interrupt, undisturbed: dict[str, str]
) -> None:
    grid, results = write(tmp_path, RARELY_SAVED), tmp_path / "results"
    sweep = start_sweep(grid, results)
    wait_until(lambda: has_trained(results))
    interrupt(sweep)
    assert sweep.wait(timeout=120) == 130
    assert "Traceback" not in (tmp_path / "sweep.log").read_text()
    (run,) = runs_of(results)
    assert not run.is_locked()
    assert (state_of(run), run.state()["cause"]) == ("pending", "interrupted")
    last = run.train_lines()[-1]["step"]
    assert (run.checkpoints / f"step-{last}").is_dir(), "the newest step is saved"
    assert start_sweep(grid, results).wait(timeout=300) == 0
    logs = [log.read_text() for log in run.path.glob("logs/*/*.out")]
    assert any(f"training from step {last}\n" in log for log in logs)
    assert of_runs(records(results)) == of_runs(undisturbed)


@pytest.mark.slow
def test_a_second_interruption_stops_at_once_and_is_not_a_failure(tmp_path: Path) -> None:
    grid, results = write(tmp_path, GRID), tmp_path / "results"
    sweep = start_sweep(grid, results)
    wait_until(lambda: has_trained(results))
    (run,) = runs_of(results)
    worker = run.state()["pid"]
    os.kill(worker, signal.SIGSTOP)  # a step that does not end
    ctrl_c(sweep)
    wait_until(lambda: "interrupt again" in (tmp_path / "sweep.log").read_text())
    time.sleep(0.5)
    assert sweep.poll() is None
    ctrl_c(sweep)
    assert sweep.wait(timeout=30) == 130
    wait_until(lambda: not run.is_locked())
    assert state_of(run) != "failed"
    assert start_sweep(grid, results).wait(timeout=300) == 0


def test_suite_train_saves_and_resumes(tmp_path: Path) -> None:
    cell = tmp_path / "cell.yaml"
    cell.write_text(
        "model: {family: dense, base: w32}\n"
        "data: {kind: bios, people: 30}\n"
        "train: {batch_rows: 4, epochs: 30, lr: 5e-3, log_every: 1, checkpoint_every: 1000}\n"
    )
    results = tmp_path / "results"
    command = [sys.executable, "-m", "suite.cli.main", "train", str(cell), "--results", str(results)]
    with (tmp_path / "train.log").open("w") as log:
        training = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        wait_until(lambda: has_trained(results))
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=120) == 130
        (run,) = runs_of(results)
        last = run.train_lines()[-1]["step"]
        assert state_of(run) == "pending"
        assert subprocess.run(command, env=environment(), stdout=log, stderr=log, timeout=300).returncode == 0
    text = (tmp_path / "train.log").read_text()
    assert f"training from step {last}\n" in text
    assert "Traceback" not in text


def test_an_error_of_an_interrupted_write_is_an_interruption(tmp_path: Path) -> None:
    run, interruption = RunDir(tmp_path), Interruption()

    def write_checkpoint() -> None:
        interruption.requested = True
        raise RuntimeError("unexpected pos 468361024 vs 468360912")

    with pytest.raises(KeyboardInterrupt):
        attempt(run, write_checkpoint, interruption)
    assert run.state()["state"] == "pending"
    assert run.state()["cause"] == "interrupted"
