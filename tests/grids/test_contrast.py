"""The primary contrast of a grid: what it selects, and one line for every mistake in it."""

import json
from pathlib import Path

import pytest

from suite.errors import UserError
from suite.grids import Grid, load_grid
from suite.launch.preparation import write_grid
from suite.rescale import rescale

GRID = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 60}
  train: {batch_rows: 8, epochs: 2, lr: 1e-3, probes: 4}
  evaluate:
    - tasks: [bios_storage]
families: {memory_plus: {model: {top_k: 8}}}
blocks:
  - axes:
      model.family: [dense, memory_plus]
      model.half_keys: [16, 32]
      seed: [0, 1]
  - set: {model: {family: dense, ffn_hidden: 64}}
"""
TREATMENT = "{model.family: memory_plus, model.half_keys: 32}"
REFERENCE = "{model.family: dense, model.ffn_hidden: null}"


def load(folder: Path, contrast: str, **overrides: str) -> Grid:
    path = folder / "grid.yaml"
    path.write_text(GRID + "contrast: " + contrast + "\n")
    return load_grid(str(path), {name.replace("__", "."): value for name, value in overrides.items()})


def declared(treatment: str = TREATMENT, reference: str = REFERENCE, metric: str = "e50", rest: str = "") -> str:
    return f"{{treatment: {treatment}, reference: {reference}, metric: {metric}{rest}}}"


def test_each_side_selects_one_variant_and_the_sweep_records_it(tmp_path: Path) -> None:
    grid = load(tmp_path, declared(rest=", base: w32"))
    assert grid.contrast is not None
    assert [name.rsplit("-", 1)[0] for name in grid.contrast.treatment] == [
        "memory_plus-w32-k32-s0",
        "memory_plus-w32-k32-s1",
    ]
    assert [name.rsplit("-", 1)[0] for name in grid.contrast.reference] == ["dense-w32-s0", "dense-w32-s1"]
    write_grid(tmp_path, grid)
    recorded = json.loads((tmp_path / "grids" / "grid" / "grid.json").read_text())["contrast"]
    assert recorded["metric"] == "e50"
    assert recorded["treatment"] == list(grid.contrast.treatment)
    assert set(recorded["treatment"] + recorded["reference"]) <= {cell.run_name for cell in grid.cells}


def test_the_contrast_follows_the_cells_of_a_scaled_grid(tmp_path: Path) -> None:
    grid = rescale(load(tmp_path, declared()), {"half_keys": 2.0})
    assert grid.contrast is not None
    assert set(grid.contrast.treatment) == {cell.run_name for cell in grid.cells if "-k64-" in cell.run_name}


def test_set_that_changes_the_cells_beyond_the_contrast_leaves_none(tmp_path: Path) -> None:
    assert load(tmp_path, declared(), train__lr="2e-3").contrast is not None
    assert load(tmp_path, declared(), model__base="w64").contrast is not None
    assert load(tmp_path, declared(rest=", base: w32"), model__base="w64").contrast is None


@pytest.mark.parametrize(
    ("contrast", "field", "value"),
    [
        (declared(rest=", at: w32"), "contrast.at", ""),
        (f"{{treatment: {TREATMENT}, metric: e50}}", "contrast.reference", "missing"),
        (declared(treatment="{model.family: peer}"), "contrast.treatment", "'peer'"),
        (declared(treatment="{model.half_key: 32}"), "contrast.treatment.model.half_key", "half_keys"),
        (declared(treatment="{model.family: memory_plus}"), "contrast.treatment", "model.half_keys"),
        (declared(reference=TREATMENT), "contrast", "same cells"),
        (declared(treatment="{model.ffn_hidden: 64}", reference="{model.family: dense, seed: 1}"), "contrast", "seed"),
        (declared(metric="accuracy"), "contrast.metric", "'accuracy'"),
        (declared(metric="piqa/acc"), "contrast.metric", "'piqa/acc'"),
        (declared(rest=", base: w64"), "contrast.treatment", "'w64'"),
        ("[dense]", "contrast", "['dense']"),
    ],
)
def test_a_wrong_contrast_is_one_line(tmp_path: Path, contrast: str, field: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, contrast)
    line = str(caught.value)
    assert f"{tmp_path / 'grid.yaml'}: {field}" in line
    assert value in line
    assert "\n" not in line


WORLDS = """
defaults:
  model: {base: w32}
  train: {batch_rows: 8, epochs: 2, lr: 1e-3, probes: 4, probe_average: 0.1}
blocks:
  - axes:
      model.family: [dense, moe]
      data: [{kind: bios, people: 60, world: 1}, {kind: bios, people: 90, world: 2}]
      seed: [0, 1]
"""
OVER = "contrast: {treatment: {model.family: moe}, reference: {model.family: dense}, metric: e50_averaged, over: %s}"


def worlds(folder: Path, over: str = "data.people", blocks: str = "") -> Grid:
    path = folder / "worlds.yaml"
    path.write_text(WORLDS + blocks + "\n" + OVER % over + "\n")
    return load_grid(str(path))


def test_a_contrast_over_a_field_has_one_variant_for_each_value_on_each_side(tmp_path: Path) -> None:
    tuned = "  - {set: {model.family: moe, train.lr: 2e-3, data: {kind: bios, people: 60, world: 1}, seed: 2}}"
    contrast = worlds(tmp_path).contrast
    assert contrast is not None
    assert (len(contrast.treatment), len(contrast.reference), contrast.over) == (4, 4, "data.people")
    assert contrast.document()["over"] == "data.people"
    with pytest.raises(UserError, match=r"contrast\.treatment: selects cells that differ in train\.lr"):
        worlds(tmp_path, blocks=tuned)
    with pytest.raises(UserError, match=r"contrast\.over: got 'data\.peopel', unknown field, did you mean"):
        worlds(tmp_path, "data.peopel")


def test_a_value_on_one_side_of_a_contrast_over_a_field_is_refused(tmp_path: Path) -> None:
    alone = "  - {set: {model.family: moe, data: {kind: bios, people: 120, world: 3}}}"
    with pytest.raises(UserError, match=r"data\.people: only the treatment has 120; allowed: the same values"):
        worlds(tmp_path, blocks=alone)
    other = "exclude: [{model.family: moe, data.people: 90, seed: 0}, {model.family: dense, data.people: 90, seed: 1}]"
    with pytest.raises(UserError, match=r"treatment and reference share no seed at data\.people 90"):
        worlds(tmp_path, blocks=other)
