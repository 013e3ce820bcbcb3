"""The bench on tables too small to mean anything."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import bench
from kernels.bench_cases import Case, Forward, step


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CPU_CASES", [Case(8, 64, 128, 8, use) for use in ("uniform", "zipf")])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)


def test_every_contender_is_right_and_reported(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--json", "--rounds", "2", "--out", str(tmp_path)]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    found = {(result["operator"], result["contender"]) for result in results}
    assert {operator for operator, _ in found} == {"forward", "step", "search"}
    assert len(results) == 2 * (2 + 3 + 2)
    for result in results:
        assert 0 < result["p20_ms"] <= result["p50_ms"] <= result["p80_ms"]
        assert result["bytes"] > 0
    assert len((tmp_path / "kernels-cpu.csv").read_text().splitlines()) == 1 + len(results)


def test_what_is_wrong_is_not_reported(small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Forward, "correct", lambda self: False)
    bench.main(["--device", "cpu", "--rounds", "1"])
    captured = capsys.readouterr()
    assert "forward" not in captured.out
    assert "wrong, not reported: forward" in captured.err


def test_a_table_that_drifts_from_dense_is_found() -> None:
    case = Case(8, 64, 128, 8, "uniform")
    ours, dense, _ = step(case)
    for turn in range(3):
        for contender in (ours, dense):
            contender.turn(case.inputs(turn))
    assert ours.correct()
    with torch.no_grad():
        ours.table_RD[5] += 1e-4
    assert not ours.correct()
