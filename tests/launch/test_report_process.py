"""The report of a sweep: a failed or damaged cell is listed in it, and does not count as a failure of the report."""

from pathlib import Path

import pytest
from run_folders import write_json, write_run

from suite.grids import Grid
from suite.launch.local import LocalExecutor
from suite.launch.scorer import Scorer


def test_the_report_of_a_grid_with_a_failed_cell_has_not_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [
        write_run(tmp_path, "dense", "w32", seed, 20.0, state=state) for seed, state in enumerate(["done", "failed"])
    ]
    record = tmp_path / "grids" / "g" / "grid.json"
    write_json(record, {"grid": "g", "source": "g.yaml", "runs": runs})
    grid = Grid("g", Path("g.yaml"), ())
    executor = LocalExecutor(grid, tmp_path, Scorer(), slots=1)
    assert executor.report(to_stderr=True)
    shown = capfd.readouterr().err
    assert f"1 runs failed: {runs[1]}; causes are in the report" in shown
    assert "the report failed" not in shown
    record.write_text("{")  # the report above exists, but no new one is written
    assert not executor.report(to_stderr=True)
    assert "the report failed; to repeat it: " in capfd.readouterr().err
