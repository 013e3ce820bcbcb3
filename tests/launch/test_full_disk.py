"""A disk without space for a checkpoint: the sweep stops in one line, and the same command resumes once there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_disk import small_disk
from sweep_processes import TINY, runs_of, suite


@pytest.mark.slow
def test_a_sweep_stops_at_a_full_disk_and_the_same_command_resumes(tmp_path: Path) -> None:
    grid = tmp_path / "tiny.yaml"
    grid.write_text(TINY)
    command = ("sweep", grid, "--results", tmp_path / "results", "--jobs", 1, "--no-report", "--json")
    with small_disk(100_000):
        stopped = suite(*map(str, command), cwd=tmp_path)
    assert stopped.returncode == 2, stopped.stderr
    (run,) = [run for run in runs_of(tmp_path / "results") if run.state_path.exists()]
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"suite: {run.checkpoints / 'step-2'}: cannot be written: ")
    assert run.state()["state"] == "pending"
    assert list(run.checkpoints.iterdir()) == []
    assert not [path for path in run.path.rglob(".*") if path.name != ".lock"]

    done = suite(*map(str, command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {cell["state"] for cell in json.loads(done.stdout)["cells"]} == {"done"}
