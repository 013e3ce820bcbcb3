"""What a sweep writes before it starts a cell: settings that changed since, and records of grids."""

import json
from pathlib import Path

import pytest
from tiny_cells import corpus_of, tiny_cell

from suite.cells import Cell, EvalConfig
from suite.errors import UserError
from suite.grids import load_grid
from suite.launch import worker
from suite.launch.preparation import grid_path, prepare, refuse_other_file, write_grid
from suite.launch.scorer import Scorer, missing_evals
from suite.records import RunDir, run_dir
from suite.train.loop import train

GRID = """
defaults:
  model: {base: w32, family: dense}
  data: {kind: bios, people: 60}
  train: {batch_rows: 8, epochs: 2, lr: 1e-3}
blocks:
  - axes: {seed: [SEED]}
"""


def begun(results: Path, cell: Cell, steps: int) -> RunDir:
    """A run that was interrupted after some steps."""
    run, corpus = prepare(results, cell), corpus_of(cell, results / "cache")
    worker.begin(run, cell, corpus, Scorer())
    left = iter(range(steps))
    assert train(cell, corpus, run, should_stop=lambda: next(left, None) is None) == "interrupted"
    return run


def test_a_changed_setting_takes_effect_when_the_run_resumes_and_is_recorded(tmp_path: Path) -> None:
    before, after = tiny_cell(checkpoint_every=1000), tiny_cell(checkpoint_every=2, log_every=3)
    assert before.run_name == after.run_name
    run, events = begun(tmp_path, before, steps=3), []
    prepare(tmp_path, after, events.append)
    assert run.read_cell() == after
    assert events == [f"changed: {run.name}: train.log_every: 1 -> 3, train.checkpoint_every: 1000 -> 2"]
    worker.begin(run, after, corpus_of(after, tmp_path / "cache"), Scorer())
    changes = [["train.log_every", 1, 3], ["train.checkpoint_every", 1000, 2]]
    assert run.read_record()["changes"] == [{"step": 3, "settings": changes}]
    left = iter(range(3))
    train(after, corpus_of(after, tmp_path / "cache"), run, should_stop=lambda: next(left, None) is None)
    assert [path.name for path in sorted(run.checkpoints.glob("step-*"))] == ["step-4", "step-6"]


def test_equal_settings_are_not_a_change(tmp_path: Path) -> None:
    run, events = begun(tmp_path, tiny_cell(), steps=1), []
    prepare(tmp_path, tiny_cell(), events.append)
    assert not events
    assert "changes" not in run.read_record()


def test_a_trained_run_retains_the_settings_it_was_trained_with(tmp_path: Path) -> None:
    run = begun(tmp_path, tiny_cell(), steps=1)
    run.set_state("done", trained=True)
    new = EvalConfig(tasks=("bios_storage",))
    prepare(tmp_path, tiny_cell(checkpoint_every=1000).model_copy(update={"evaluate": (new,)}))
    assert run.read_cell().train == tiny_cell().train
    assert run.read_cell().evaluate == (new,)


def test_a_task_that_another_grid_has_scored_is_not_missing(tmp_path: Path) -> None:
    first, second = EvalConfig(tasks=("bios_storage", "bios_qa")), EvalConfig(tasks=("bios_qa", "bios_choice"))
    other_limit = EvalConfig(tasks=("bios_qa",), limit=5)
    cell = tiny_cell().model_copy(update={"evaluate": (second, other_limit)})
    run = prepare(tmp_path, cell.model_copy(update={"evaluate": (first,)}))
    run.write_eval(first.hash8, {"tasks": {}})
    prepare(tmp_path, cell)
    rest = EvalConfig(tasks=("bios_choice",))
    assert run.read_cell().evaluate == (first, rest, other_limit)
    assert missing_evals(run, cell) == [second.hash8, other_limit.hash8]
    run.write_eval(rest.hash8, {"tasks": {}})
    assert missing_evals(run, cell) == [other_limit.hash8]


def test_set_and_scale_name_the_grid_unless_the_runs_stay_the_same(tmp_path: Path) -> None:
    def name(**overrides: str) -> str:
        return load_grid(write(tmp_path, "0"), {path.replace("__", "."): text for path, text in overrides.items()}).name

    assert name() == "grid"
    assert name(train__epochs="3", seed="1") == "grid-train.epochs=3-seed=1"
    assert name(train__checkpoint_every="3", evaluate="[{tasks: [bios_storage]}]") == "grid"


def test_names_of_grids_with_long_settings_differ_and_are_short(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("""
defaults: {model: {base: w32}, data: {kind: text, path: data}, train: {batch_rows: 8, tokens: 1000, lr: 1e-3}}
blocks: [{axes: {model.family: [dense]}}]
""")
    texts = [f"data/{letter}" for letter in "ab"] + ["data_a", "x" * 300, "x" * 301]
    names = {load_grid(grid, {"model.base": "w32", "data.fingerprint": text}, need_data=False).name for text in texts}
    assert len(names) == len(texts)
    assert all(len(one) < 100 and "/" not in one for one in names)


def test_another_file_of_the_same_name_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in ("mine", "yours"):
        (tmp_path / folder).mkdir()
    mine, yours = (load_grid(write(tmp_path / folder, seed)) for folder, seed in (("mine", "0"), ("yours", "1")))
    results = tmp_path / "results"
    path = grid_path(results, mine)
    refuse_other_file(path, mine)
    write_grid(results, mine)
    refuse_other_file(path, mine)
    with pytest.raises(UserError) as refused:
        refuse_other_file(path, yours)
    for part in (mine.source, yours.source, path, "rename"):
        assert str(part) in str(refused.value)
    assert "\n" not in str(refused.value)
    write(tmp_path / "mine", "7")
    refuse_other_file(path, load_grid(str(mine.source)))  # the same file, edited
    mine.source.unlink()
    refuse_other_file(path, yours)  # the other file was moved


def test_the_record_of_a_grid_has_the_options_that_made_it(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, "0"), {"seed": "3"})
    write_grid(tmp_path, grid)
    record = json.loads(grid_path(tmp_path, grid).read_text())
    assert record["grid"] == "grid-seed=3"
    assert record["arguments"] == ["--set=seed=3"]
    assert record["runs"] == [run_dir(tmp_path, cell).name for cell in grid.cells]


def write(folder: Path, seed: str) -> str:
    path = folder / "grid.yaml"
    path.write_text(GRID.replace("SEED", seed))
    return str(path)
