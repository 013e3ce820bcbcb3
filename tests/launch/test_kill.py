"""Kill -9 anywhere, start again: the records are those of a sweep nobody struck, but for times and process ids."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from sweep_processes import TINY, final_weights, parent, records, runs_of, start_sweep, state_of

from suite.records import RunDir

SMOKE = Path(__file__).parents[2] / "grids" / "smoke.yaml"
VICTIMS = ("worker", "launcher")
STAGES = ("training", "checkpointing", "evaluating")
Blow = tuple[str, str, float]
"""Whom, at which stage of a run, and how many seconds into it."""


def is_training(run: RunDir) -> bool:
    return state_of(run) == "running" and bool(run.train_lines()) and not run.state().get("trained")


def is_checkpointing(run: RunDir) -> bool:
    return run.checkpoints.exists() and any(run.checkpoints.glob(".*"))


def is_evaluating(run: RunDir) -> bool:
    return state_of(run) == "running" and bool(run.state().get("trained"))


IN_STAGE = {"training": is_training, "checkpointing": is_checkpointing, "evaluating": is_evaluating}


def strike(launcher: subprocess.Popen[str], results: Path, blow: Blow) -> bool:
    """Wait for a run in that stage, then a moment, then kill -9 one of its processes; False if the sweep ends first."""
    victim, stage, delay_s = blow
    while launcher.poll() is None:
        time.sleep(0.001)
        for run in filter(IN_STAGE[stage], runs_of(results)):
            if stage != "checkpointing":
                time.sleep(delay_s)
            worker = run.state()["pid"]
            pid = {"worker": worker, "launcher": launcher.pid}[victim]
            if parent(worker) is not None:  # it is alive
                os.kill(pid, signal.SIGKILL)
                return True
    return False


def finish(grid: Path, results: Path) -> Path:
    assert start_sweep(grid, results).wait(timeout=600) == 0, (grid.parent / "sweep.log").read_text()
    return results


def struck(grid: Path, folder: Path, blows: list[Blow]) -> list[Path]:
    """Sweeps that took all these blows, started anew whenever they lost their launcher, then brought to their end.

    A sweep that ends before its next blow leaves that one to another sweep.
    """
    finished: list[Path] = []
    while blows and len(finished) < 10:
        results = folder / f"struck-{len(finished)}"
        launcher = start_sweep(grid, results)
        while blows and strike(launcher, results, blows[0]):
            victim, _, _ = blows.pop(0)
            if victim == "launcher":
                launcher.wait(timeout=600)
                launcher = start_sweep(grid, results)
        launcher.wait(timeout=600)
        finished.append(finish(grid, results))
    assert not blows
    return finished


def assert_equal_sweeps(one: Path, other: Path) -> None:
    expected, found = records(one), records(other)
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert found[name] == text, name
    weights, found_weights = final_weights(one), final_weights(other)
    for run, tensors in weights.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found_weights[run][name]), (run, name)


def test_three_blows_leave_the_records_of_an_unbroken_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "tiny.yaml"
    grid.write_text(TINY)
    choose = random.Random(0)
    blows = [
        (victim, stage, choose.uniform(0.0, 0.3))
        for victim, stage in zip(("worker", "launcher", "worker"), STAGES, strict=True)
    ]
    expected = finish(grid, tmp_path / "unbroken")
    for results in struck(grid, tmp_path, blows):
        assert_equal_sweeps(expected, results)


@pytest.mark.slow
def test_ten_blows_leave_the_records_of_an_unbroken_smoke_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "smoke.yaml"
    grid.write_text(SMOKE.read_text())
    choose = random.Random(1)
    blows = [(VICTIMS[moment % 2], choose.choice(STAGES), choose.uniform(0.0, 1.0)) for moment in range(10)]
    expected = finish(grid, tmp_path / "unbroken")
    for results in struck(grid, tmp_path, blows):
        assert_equal_sweeps(expected, results)
