"""`suite runs`: what is on disk, and deleting it."""

import json
from pathlib import Path

import pytest
from cli_runner import Suite
from tiny_cells import corpus_of, tiny_cell

from suite.errors import UserError
from suite.grids import Grid
from suite.housekeeping import delete_run, list_runs, prune_checkpoints
from suite.launch import worker
from suite.launch.preparation import prepare, write_grid
from suite.records import RunDir
from suite.train.checkpoint import load_model, steps_saved


@pytest.fixture
def trained(tmp_path: Path) -> RunDir:
    """A run with several checkpoints, in a grid, next to one that was never started."""
    cell = tiny_cell(checkpoint_every=2, keep_checkpoints=4)
    run = prepare(tmp_path / "results", cell)
    assert worker.run_cell(run.path) == "done"
    write_grid(tmp_path / "results", Grid("mine", tmp_path / "mine.yaml", (cell,)))
    prepare(tmp_path / "results", tiny_cell(seed=1))
    return run


def test_runs_are_listed_deleted_and_pruned(trained: RunDir, suite: Suite, tmp_path: Path) -> None:
    listed = json.loads(suite("runs", "--json").stdout)["runs"]
    mine = next(entry for entry in listed if entry["run"] == trained.name)
    other = next(entry for entry in listed if entry["run"] != trained.name)
    assert (mine["state"], mine["checkpoints"], mine["grids"]) == ("done", 4, ["mine"])
    assert (other["state"], other["checkpoints"], other["grids"]) == ("pending", 0, [])
    files = {path: path.stat().st_size for path in trained.path.rglob("*") if path.is_file()}
    assert mine["size"] == sum(files.values())
    last = steps_saved(trained)[-1]
    freed = json.loads(suite("runs", "prune", trained.name, "--json").stdout)["pruned"][trained.name]
    assert steps_saved(trained) == [last]
    assert freed == sum(size for path, size in files.items() if not path.exists())
    cell = trained.read_cell()
    load_model(trained, cell, corpus_of(cell, tmp_path / "results" / "cache"))
    assert suite("runs", "delete", trained.name, other["run"]).returncode == 0
    assert list_runs(tmp_path / "results") == []
    refused = suite("runs", "delete", trained.name)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_run_whose_process_was_killed_is_pending(trained: RunDir, tmp_path: Path) -> None:
    trained.set_state("running")
    with trained.lock():
        assert {run.state for run in list_runs(tmp_path / "results") if run.run == trained.name} == {"running"}
    assert {run.state for run in list_runs(tmp_path / "results") if run.run == trained.name} == {"pending"}


def test_a_run_that_is_in_use_is_refused(trained: RunDir) -> None:
    with trained.lock():
        for change in (lambda: prune_checkpoints(trained), lambda: delete_run(trained, trained.path.parent.parent)):
            with pytest.raises(UserError, match="is locked by another process"):
                change()
    trained.set_state("pending", trained=False)
    with pytest.raises(UserError, match="may resume from its checkpoints"):
        prune_checkpoints(trained)
    assert len(steps_saved(trained)) == 4


def test_pruning_retains_the_newest_whole_checkpoint(trained: RunDir) -> None:
    *_, whole, damaged = steps_saved(trained)
    (trained.checkpoints / f"step-{damaged}" / "state.pt").write_bytes(b"")
    prune_checkpoints(trained)
    assert steps_saved(trained) == [whole]
