"""A machine without Slurm: one line states this, and scripts can still be written."""

from pathlib import Path

import pytest
from sweep_processes import TINY, suite


def test_a_sweep_on_slurm_is_refused_in_one_line_and_leaves_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, profile = tmp_path / "tiny.yaml", tmp_path / "cpu.yaml"
    grid.write_text(TINY)
    profile.write_text("time: 10\n")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    options = ("--executor", "slurm", "--profile", profile, "--results", tmp_path / "results")
    done = suite("sweep", grid, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "sbatch" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    scripts = suite("sweep", grid, *options, "--dry-run", cwd=tmp_path)
    assert scripts.returncode == 0, scripts.stderr
    assert scripts.stdout.count(".sh\n") == 3
