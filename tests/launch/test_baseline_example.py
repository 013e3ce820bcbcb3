"""The worked example of docs/adding-a-baseline.md needs only its own file to appear in every table and report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_processes import suite
from typer.testing import CliRunner

from suite.cli.main import app
from suite.errors import UserError
from suite.grids import load_grid
from suite.models import registry

ROOT = Path(__file__).resolve().parents[2]
GRID = """
defaults:
  model: {base: w32}
  data: {kind: bios, people: 30, questions: 0.5}
  train: {batch_rows: 4, epochs: 6, lr: 5e-3, value_lr: 2e-2, probes: 4, log_every: 5}
  evaluate: [{tasks: [bios_storage], limit: 20}]
blocks:
  - axes: {model.family: [dense, hashed_ngram], seed: [0]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    before = set(registry.families())
    yield tmp_path
    registry.unregister(set(registry.families()) - before)


def call(*arguments: str) -> Any:
    """Run a verb in this process; returns its JSON document."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_example_is_trained_scored_planned_and_reported(folder: Path) -> None:
    example = str(ROOT / "docs" / "hashed_ngram.py")
    swept = suite("sweep", "grid.yaml", "--jobs", "1", "--baseline", example, "--json", cwd=folder)
    assert swept.returncode == 0, swept.stderr
    (run,) = (cell["run"] for cell in json.loads(swept.stdout)["cells"] if cell["run"].startswith("hashed_ngram"))
    record = json.loads((folder / "results" / "runs" / run / "cell.json").read_text())
    assert len(record["cell"]["baseline"]) == 64
    assert record["account"]["params_memory"] > 0
    report = (folder / "results" / "grids" / "grid" / "report.md").read_text()
    assert re.search(r"hashed_ngram.*dense", report)
    # A run holds its baseline: scoring it again needs no option.
    call("eval", run, "--tasks", "bios_paraphrase", "--limit", "5")
    cells = {cell["run"]: cell for cell in call("plan", "grid.yaml", "--gpu", "cpu", "--baseline", example)["cells"]}
    assert cells[run]["params"]["total"] == record["account"]["params_total"]
    assert cells[run]["measured"]["wall_s"] > 0


def test_without_its_file_the_family_is_unknown(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'hashed_ngram'.*allowed: dense"):
        load_grid("grid.yaml")


def test_the_shortest_baseline_of_the_page_works(folder: Path) -> None:
    page = (ROOT / "docs" / "adding-a-baseline.md").read_text()
    match = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert match
    grid = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert grid
    (folder / "mine.py").write_text(match[1])
    (folder / "mygrid.yaml").write_text(grid[1])
    planned = call("plan", "mygrid.yaml", "--baseline", "mine.py")
    assert sorted(cell["family"] for cell in planned["cells"]) == ["dense"] * 2 + ["squared"] * 4
    (folder / "mygrid.yaml").write_text(grid[1].replace("squared]", "squared, hashed_ngram]"))
    both = call("plan", "mygrid.yaml", "--baseline", "mine.py", "--baseline", str(ROOT / "docs" / "hashed_ngram.py"))
    assert {cell["family"] for cell in both["cells"]} == {"dense", "squared", "hashed_ngram"}


def test_a_baseline_that_reads_values_of_tensors_is_planned_without_an_estimate_of_its_memory(folder: Path) -> None:
    page = (ROOT / "docs" / "adding-a-baseline.md").read_text()
    match = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert match
    by_value = match[1].replace("return self.w2(", "return x_BTD * (x_BTD.sum().item() < 1e9) + self.w2(")
    (folder / "mine.py").write_text(by_value)
    (folder / "grid.yaml").write_text(GRID.replace("hashed_ngram", "squared"))
    cells = {cell["family"]: cell for cell in call("plan", "grid.yaml", "--baseline", "mine.py")["cells"]}
    assert cells["dense"]["fits"]
    assert not cells["squared"]["fits"]
    assert "without values" in cells["squared"]["why"]
    assert cells["squared"]["gpu_hours"] > 0


def test_an_exception_at_the_length_of_the_rows_is_one_line(folder: Path) -> None:
    page = (ROOT / "docs" / "adding-a-baseline.md").read_text()
    match = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert match
    code = match[1].replace("return self.w2(", "return x_BTD * (1 / (x_BTD.shape[1] != 200)) + self.w2(")
    (folder / "mine.py").write_text(code)
    (folder / "grid.yaml").write_text(GRID.replace("hashed_ngram", "squared").replace("people", "seq_len: 200, people"))
    for verb in (["plan"], ["sweep", "--no-report"]):
        done = suite(verb[0], "grid.yaml", *verb[1:], "--baseline", "mine.py", cwd=folder)
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert re.fullmatch(r"suite: .*mine\.py: family squared: line \d+: ZeroDivisionError: division by zero", line)
        assert "Traceback" not in done.stderr


def test_a_single_cell_is_trained_scored_and_exported(folder: Path) -> None:
    example = str(ROOT / "docs" / "hashed_ngram.py")
    (folder / "cell.yaml").write_text(
        "model: {family: hashed_ngram, base: w32}\ndata: {kind: bios, people: 20}\n"
        "train: {batch_rows: 2, epochs: 0.2, lr: 1e-3}\n"
    )
    (trained,) = call("train", "cell.yaml", "--baseline", example)["cells"]
    assert trained["state"] == "done"
    call("eval", trained["run"], "--tasks", "bios_storage", "--limit", "3")
    assert any(name.endswith("baseline.py") for name in call("export", trained["run"], "--to", "out")["files"])
