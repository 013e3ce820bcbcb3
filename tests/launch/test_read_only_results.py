"""Results that may only be read, such as a colleague's: they can be looked at, and nothing tries to write there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_processes import TINY, environment

from suite.grids import load_grid
from suite.launch.preparation import prepare
from suite.launch.worker import run_cell

GRID = TINY.replace("[dense, memory_plus]", "[dense]").replace("epochs: 8", "epochs: 1")
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""The start of a command that root may run only where the permissions of files let it."""


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny.yaml and `results`, where its cell is done and nothing can be written."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and setpriv is not installed")
    folder = tmp_path_factory.mktemp("read-only")
    (folder / "tiny.yaml").write_text(GRID)
    results = folder / "results"
    for cell in load_grid(str(folder / "tiny.yaml")).cells:
        assert run_cell(prepare(results, cell).path) == "done"
    paths = [results, *results.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    yield folder
    for path in paths:
        path.chmod(path.stat().st_mode | 0o200)


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line on the results of `folder`, run without the right to write them."""
    prefix = WITHOUT_OVERRIDE if os.geteuid() == 0 else ()
    command = [*prefix, sys.executable, "-m", "suite.cli.main", *arguments, "--results", "results"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "results").rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [("status",), ("sweep", "--dry-run"), ("plan",)], ids=lambda words: words[0])
def test_results_that_cannot_be_written_can_be_looked_at(read_only: Path, arguments: tuple[str, ...]) -> None:
    verb, *options = arguments
    before = contents(read_only)
    done = suite(read_only, verb, "tiny.yaml", "--json", *options)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell.get("state", "done") == "done"
    assert contents(read_only) == before


def test_a_run_that_cannot_be_written_can_be_exported_elsewhere(read_only: Path, tmp_path: Path) -> None:
    (run,) = (read_only / "results" / "runs").iterdir()
    done = suite(read_only, "export", run.name, "--to", str(tmp_path / "exported"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exported" / "config.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "tiny.yaml", "--no-report"),
        ("sweep", "tiny.yaml", "--no-report", "--set", "seed=7"),
        ("eval", "tiny.yaml", "--tasks", "bios_storage", "--limit", "3"),
    ],
)
def test_a_verb_that_cannot_write_states_that_in_one_line(read_only: Path, arguments: tuple[str, ...]) -> None:
    done = suite(read_only, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "results" in done.stderr


def test_a_record_file_without_read_permission_fails_its_run_by_name(read_only: Path, tmp_path: Path) -> None:
    shutil.copytree(read_only, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "results" / "runs").glob("*/cell.json")
    path.chmod(0)
    done = suite(tmp_path, "status", "tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["state"] == "failed"
    assert str(path.relative_to(tmp_path)) in cell["cause"]
    assert "Permission denied" in cell["cause"]
