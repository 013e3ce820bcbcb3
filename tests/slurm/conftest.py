"""Tests that need Slurm are skipped where there is none; they leave its queue empty."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import LAUNCHERS, PROFILE, answers, slurm


@pytest.fixture(scope="session")
def _slurm() -> None:
    if not answers():
        pytest.skip("sinfo does not reach a Slurm (tests/slurm/cluster.py starts one)")


@pytest.fixture
def folder(tmp_path: Path, _slurm: None) -> Iterator[Path]:
    """A folder with a profile; jobs and sweeps that a test leaves behind are ended."""
    (tmp_path / "cpu.yaml").write_text(PROFILE)
    yield tmp_path
    while LAUNCHERS:
        LAUNCHERS.pop().kill()
    for stage in ("train", "evaluate", "report"):
        subprocess.run(["scancel", "--me", f"--name=tiny-{stage}"], capture_output=True)


@pytest.fixture
def ours(_slurm: None) -> None:
    """For tests that take nodes down: they run only on the cluster of cluster.py."""
    if "virtual" not in slurm("scontrol", "show", "config").partition("ClusterName")[2].partition("\n")[0]:
        pytest.skip("takes nodes down, and so runs only on the Slurm of tests/slurm/cluster.py")
