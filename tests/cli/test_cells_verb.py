"""`suite cells` and `suite sweep --cell`: one cell of a grid, for job arrays."""

import json
from pathlib import Path

from cli_runner import Suite

from suite.grids import load_cell, load_grid

GRID = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 30}
  train: {batch_rows: 4, epochs: 1, lr: 5e-3}
families:
  memory_plus: {model: {half_keys: 8, top_k: 4}}
blocks:
  - axes: {model.family: [dense, memory_plus], seed: [0, 1]}
"""


def test_every_cell_is_a_file_that_train_reads(suite: Suite, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    listed = json.loads(suite("cells", str(path), "--to", str(tmp_path / "cells"), "--json").stdout)["cells"]
    assert [entry["number"] for entry in listed] == [1, 2, 3, 4]
    assert [load_cell(Path(entry["file"])) for entry in listed] == list(load_grid(str(path)).cells)
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == [
        f"{entry['number']}-{entry['run']}.json" for entry in listed
    ]


def test_a_sweep_of_one_cell_records_the_whole_grid(suite: Suite, tmp_path: Path) -> None:
    path, results = tmp_path / "grid.yaml", str(tmp_path / "results")
    path.write_text(GRID)
    cells = load_grid(str(path)).cells
    done = suite("sweep", str(path), "--results", results, "--cell", "2", "--json")
    assert done.returncode == 0, done.stderr
    (status,) = json.loads(done.stdout)["cells"]
    assert (status["run"], status["state"]) == (cells[1].run_name, "done")
    record = json.loads((tmp_path / "results" / "grids" / "grid" / "grid.json").read_text())
    assert record["runs"] == [cell.run_name for cell in cells]
    assert not (tmp_path / "results" / "grids" / "grid" / "report.md").exists()
    for name in ("0", "5", "dense"):
        refused = suite("sweep", str(path), "--results", results, "--cell", name)
        assert refused.returncode == 2
        assert f"--cell: got {name!r}, allowed: 1 to 4, or a run name (suite cells {path})" in refused.stderr
    by_name = suite("sweep", str(path), "--results", results, "--cell", cells[0].run_name, "--dry-run", "--json")
    assert [cell["run"] for cell in json.loads(by_name.stdout)["cells"]] == [cells[0].run_name]
