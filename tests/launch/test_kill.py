"""After kill -9 at any moment and a restart, the records equal those of an undisturbed sweep, except for times and
process ids."""

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
Kill = tuple[str, str, float]
"""The process that is killed, the stage of a run, and the seconds into that stage."""


def is_training(run: RunDir) -> bool:
    return state_of(run) == "running" and bool(run.train_lines()) and not run.state().get("trained")


def is_checkpointing(run: RunDir) -> bool:
    return run.checkpoints.exists() and any(run.checkpoints.glob(".*"))


def is_evaluating(run: RunDir) -> bool:
    return state_of(run) == "running" and bool(run.state().get("trained"))


IN_STAGE = {"training": is_training, "checkpointing": is_checkpointing, "evaluating": is_evaluating}


def kill_one(launcher: subprocess.Popen[str], results: Path, kill: Kill) -> bool:
    """Wait until a run is in that stage for the given time, and kill its process; False if the sweep ends first."""
    victim, stage, delay_s = kill
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


def killed_sweeps(grid: Path, folder: Path, kills: list[Kill]) -> list[Path]:
    """The results of finished sweeps that were killed as `kills` states; each is restarted if its launcher is killed.

    If a sweep ends before its next kill, another sweep is started for it.
    """
    finished: list[Path] = []
    while kills and len(finished) < 10:
        results = folder / f"killed-{len(finished)}"
        launcher = start_sweep(grid, results)
        while kills and kill_one(launcher, results, kills[0]):
            victim, _, _ = kills.pop(0)
            if victim == "launcher":
                launcher.wait(timeout=600)
                launcher = start_sweep(grid, results)
        launcher.wait(timeout=600)
        finished.append(finish(grid, results))
    assert not kills
    return finished


def assert_equal_sweeps(one: Path, other: Path) -> None:
    expected, actual = records(one), records(other)
    assert actual.keys() == expected.keys()
    for name, text in expected.items():
        assert actual[name] == text, name
    weights, other_weights = final_weights(one), final_weights(other)
    for run, tensors in weights.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other_weights[run][name]), (run, name)


def test_three_kills_leave_the_records_of_an_undisturbed_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "tiny.yaml"
    grid.write_text(TINY)
    choose = random.Random(0)
    kills = [
        (victim, stage, choose.uniform(0.0, 0.3))
        for victim, stage in zip(("worker", "launcher", "worker"), STAGES, strict=True)
    ]
    expected = finish(grid, tmp_path / "undisturbed")
    for results in killed_sweeps(grid, tmp_path, kills):
        assert_equal_sweeps(expected, results)


@pytest.mark.slow
def test_ten_kills_leave_the_records_of_an_undisturbed_smoke_sweep(tmp_path: Path) -> None:
    grid = tmp_path / "smoke.yaml"
    grid.write_text(SMOKE.read_text())
    choose = random.Random(1)
    kills = [(VICTIMS[moment % 2], choose.choice(STAGES), choose.uniform(0.0, 1.0)) for moment in range(10)]
    expected = finish(grid, tmp_path / "undisturbed")
    for results in killed_sweeps(grid, tmp_path, kills):
        assert_equal_sweeps(expected, results)
