"""A worker that the kernel kills for its memory, as a sweep sees it: a process that SIGKILL ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweep_processes import TINY, runs_of, suite

KILLS_ITSELF = """
import os
import signal

from suite.baselines import Family, ModelConfig, SwiGLU, register


class Killed(SwiGLU):
    calls = 0

    def forward(self, x):
        Killed.calls += self.training
        if Killed.calls > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def feed_forwards(config):
    return [Killed(config.size.dim, config.size.ffn_hidden) for _ in range(config.size.layers)]


register(Family("killed", ModelConfig, feed_forwards))
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again_fails_its_cell_although_it_saves(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLS_ITSELF)
    grid, results = tmp_path / "tiny.yaml", tmp_path / "results"
    grid.write_text(TINY.replace("[dense, memory_plus]", "[killed]").replace("epochs: 8", "epochs: 400"))
    options = ("--baseline", tmp_path / "killed.py", "--results", results, "--json", "--no-report")
    done = suite("sweep", grid, *options, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["state"] == "failed"
    assert "killed (out of memory?)" in cell["cause"]
    (run,) = runs_of(results)
    steps = [
        line.rpartition(" ")[2]
        for log in sorted(run.path.glob("logs/*/*.out"), key=lambda path: path.stat().st_mtime)
        for line in log.read_text().splitlines()
        if "training from step" in line
    ]
    assert len(steps) == 3
    assert 0 == int(steps[0]) < int(steps[1]) < int(steps[2]), "it saved checkpoints between the kills"
