"""Parents in a grid: which cells they become, what identifies a child, and one line for every mistake."""

import json
from pathlib import Path

import pytest

from suite.errors import UserError
from suite.grids import Grid, load_cell, load_grid
from suite.rescale import rescale

BASE = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 60}
  train: {batch_rows: 8, lr: 1e-3, epochs: 2}
families:
  memory_plus: {model: {half_keys: 16, top_k: 8}, train: {value_lr: 2e-2}}
"""
GRID = (
    BASE
    + """
parents:
  pretrained: {train: {epochs: 5}}
blocks:
  - set: {train: {init_from: pretrained}}
    axes:
      model.family: [dense, memory_plus]
      train.lr: [1e-3, 1e-4]
      seed: [0, 1]
"""
)


def load(folder: Path, text: str, **overrides: str) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(text)
    return load_grid(str(path), {name.replace("__", "."): value for name, value in overrides.items()})


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_parent_is_a_cell_for_each_shape_and_seed_and_comes_first(tmp_path: Path) -> None:
    grid = load(tmp_path, GRID)
    parents, children = grid.cells[:4], grid.cells[4:]
    assert [(cell.model.family, cell.seed) for cell in parents] == [
        ("dense", 0),
        ("dense", 1),
        ("memory_plus", 0),
        ("memory_plus", 1),
    ]
    assert all(cell.train.epochs == 5 and cell.train.parent is None for cell in parents)
    assert len(children) == 8
    hashes = {(cell.model.family, cell.seed): cell.hash8 for cell in parents}
    for child in children:
        assert child.train.parent == hashes[child.model.family, child.seed]
        assert child.train.init_from == "pretrained"


def test_a_child_changes_with_its_parent_and_not_with_the_name_or_folder_of_the_parent(tmp_path: Path) -> None:
    children = [cell.hash8 for cell in load(tmp_path, GRID).cells[4:]]
    renamed = load(tmp_path, GRID.replace("pretrained", "other")).cells[4:]
    assert [cell.hash8 for cell in renamed] == children
    changed = load(tmp_path, GRID.replace("epochs: 5", "epochs: 6")).cells[4:]
    assert not {cell.hash8 for cell in changed} & {*children}


def test_a_run_outside_the_grid_is_named_by_name_or_path_with_the_same_hash(tmp_path: Path) -> None:
    parent = load(tmp_path, BASE + "blocks: [{set: {model.family: dense}}]").cells[0]
    hashes = set()
    for folder in ("here", "there"):
        path = tmp_path / folder / "a-copy"
        path.mkdir(parents=True)
        (path / "cell.json").write_text(json.dumps({"cell": {}, "hash": parent.hash8}))
        hashes.add(load(tmp_path, start_from(str(path))).cells[0].hash8)
    hashes.add(load(tmp_path, start_from(parent.run_name)).cells[0].hash8)
    assert len(hashes) == 1


def start_from(name: str) -> str:
    return BASE + f"blocks: [{{set: {{model.family: dense, train.init_from: {name}}}}}]"


def test_a_recorded_cell_keeps_its_hash_without_its_parent(tmp_path: Path) -> None:
    child = load(tmp_path, GRID).cells[-1]
    (tmp_path / "cell.json").write_text(json.dumps({"cell": child.model_dump(mode="json")}))
    assert load_cell(tmp_path / "cell.json") == child


def test_a_parent_of_another_family_has_the_shape_but_not_the_options_of_its_child(tmp_path: Path) -> None:
    text = (
        BASE
        + """
parents:
  dense: {model: {family: dense}, train: {epochs: 5}}
  healed: {train: {init_from: dense, epochs: 3}}
blocks:
  - set: {model: {family: memory_plus, dim: 64}, train: {init_from: healed}}
"""
    )
    dense, healed, child = load(tmp_path, text).cells
    assert (dense.model.family, healed.model.family) == ("dense", "memory_plus")
    assert dense.model.size == child.model.size
    assert (healed.train.parent, child.train.parent) == (dense.hash8, healed.hash8)
    assert [cell.train.epochs for cell in (dense, healed, child)] == [5, 3, 2]


def test_children_of_a_scaled_grid_start_from_scaled_parents(tmp_path: Path) -> None:
    cells = rescale(load(tmp_path, GRID), {"tokens": 0.5}).cells
    assert {cell.train.parent for cell in cells[4:]} == {cell.hash8 for cell in cells[:4]}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("init_from: pretrained", "init_from: nothing", ["train.init_from", "'nothing'"]),
        ("train: {init_from: pretrained}", "train: {lr: 1e-3}", ["parents.pretrained"]),
        ("{train: {epochs: 5}}", "{train: {init_from: pretrained}}", ["pretrained -> pretrained"]),
        ("{train: {epochs: 5}}", "{model: {family: dense, half_keys: 3}}", ["parents.pretrained.model.half_keys"]),
        ("{train: {epochs: 5}}", "{train: {epoch: 5}}", ["parents.pretrained", "train.epoch"]),
        ("  pretrained: {train: {epochs: 5}}", "  pretrained: 3", ["parents.pretrained"]),
    ],
)
def test_a_mistake_is_one_line(old: str, new: str, words: list[str], tmp_path: Path) -> None:
    line = complaint(tmp_path, GRID.replace(old, new))
    assert all(word in line for word in words), line


def test_a_cycle_of_two_parents_is_one_line(tmp_path: Path) -> None:
    text = GRID.replace(
        "  pretrained: {train: {epochs: 5}}",
        "  pretrained: {train: {init_from: healed}}\n  healed: {train: {init_from: pretrained}}",
    )
    assert "pretrained -> healed -> pretrained" in complaint(tmp_path, text)
