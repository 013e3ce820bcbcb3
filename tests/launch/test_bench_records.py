"""The synthetic runs of `suite bench records` are read like runs that were trained."""

from __future__ import annotations

from pathlib import Path

from suite.bench.records import write_runs
from suite.launch.status import grid_status
from suite.records import RunDir


def test_synthetic_runs_are_finished_and_have_the_records_of_real_ones(tmp_path: Path) -> None:
    grid = write_runs(tmp_path, 12)
    assert len(grid.cells) >= 12
    statuses = grid_status(tmp_path / "results", grid)
    assert {status.state for status in statuses} == {"done"}
    assert {status.note for status in statuses} == {None}, "no run is stale"
    assert all("bits stored" in str(status.headline) for status in statuses)
    for status in statuses:
        run = RunDir(tmp_path / "results" / "runs" / status.run)
        lines = run.train_lines()
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        assert any("probe" in line for line in lines)
        assert run.usage_path.exists() == any("usage" in line for line in lines)
