"""The benchmark, on tables too small for meaningful timings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import main
from kernels.bench.cases import Case, Forward
from kernels.bench.peers import layers
from kernels.bench.steps import DenseStep, RowStep, SparseStep, step


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "CPU_CASES", [Case(8, 64, 128, 8, use) for use in ("uniform", "zipf")])
    monkeypatch.setattr(main, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(main, "ROUNDS", 2)


def test_every_contender_is_correct_and_reported(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--device", "cpu", "--json", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    results = document["results"]
    found = {(result["operator"], result["contender"]) for result in results}
    assert {operator for operator, _ in found} >= {"forward", "step", "search"}
    assert sum(result["operator"] != "layer" for result in results) == 2 * (3 + 4 + 3)
    for result in results:
        assert 0 < result["p20_ms"] <= result["p50_ms"] <= result["p80_ms"]
        assert result["bytes"] > 0
    assert len((tmp_path / "kernels-cpu.csv").read_text().splitlines()) == 1 + len(results)
    of_steps = {(r["use"], r["contender"]): r for r in results if r["operator"] == "step"}
    for row in document["step_against_dense"]:
        assert row["ours_ms"] == of_steps[row["use"], "ours"]["p50_ms"]
        assert row["dense_ms"] == of_steps[row["use"], "dense AdamW"]["p50_ms"]
    assert len((tmp_path / "step-against-dense-cpu.csv").read_text().splitlines()) == 3
    assert "Step against dense" in captured.err


def test_layers_of_packages_that_are_installed_agree_with_ours() -> None:
    pytest.importorskip("product_key_memory")
    case = Case(16, 64, 128, 8, "uniform")
    contenders = layers(case)
    assert [contender.name for contender in contenders] == ["ours", "product-key-memory"]
    for contender in contenders:
        assert contender.turn(case.inputs(0)) > 0
        assert contender.correct()
    with torch.no_grad():
        contenders[0].out_ND += 1e-2  # type: ignore[attr-defined]
    assert not contenders[0].correct()


def test_wrong_results_are_not_reported(small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Forward, "correct", lambda self: False)
    main.main(["--device", "cpu"])
    captured = capsys.readouterr()
    assert not [line for line in captured.out.splitlines() if line.startswith("forward")]
    assert "not reported: forward" in captured.err


def test_table_sizes_without_a_case_are_refused(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--device", "cpu", "--rows", "63"])
    assert "--rows: got 63, allowed: 64" in capsys.readouterr().err


def test_cases_that_do_not_fit_in_memory_are_skipped_and_named(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "free_bytes", lambda device: 5000)
    assert main.main(["--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("does not fit in memory") == 2
    assert "step" not in captured.out.split("Step against dense")[0]


def test_without_memory_for_the_dense_path_only_the_row_update_is_timed() -> None:
    case = Case(8, 64, 128, 8, "uniform")
    assert [contender.name for contender in step(case, case.rows_bytes + case.dense_bytes - 1)] == ["ours"]


def test_a_table_that_differs_from_the_dense_one_is_detected() -> None:
    case = Case(8, 64, 128, 8, "uniform")
    ours, dense, *_ = step(case, 1e9)
    for turn in range(3):
        for contender in (ours, dense):
            contender.turn(case.inputs(turn))
    assert ours.correct()
    with torch.no_grad():
        ours.table_RD[5] += 1e-4
    assert not ours.correct()


@pytest.mark.parametrize("make", [lambda case: RowStep(case, True), lambda case: DenseStep(case, True), SparseStep])
def test_a_contender_whose_update_differs_from_float64_is_detected(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(8, 256, 128, 8, "zipf")
    contender = make(case)
    contender.turn(case.inputs(0))
    contender.prove(case.inputs(1))
    assert contender.correct()
    monkeypatch.setattr("kernels.bench.steps.BETAS", (0.8, 0.95))  # of the expected values; the optimizer keeps its own
    contender.prove(case.inputs(2))
    assert not contender.correct()


def test_the_copy_bandwidth_is_measured_on_the_same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "seconds_of", lambda work, device: 2.0)
    assert main.copy_bandwidth("cpu", size=1000) == 2 * 4000 / 2.0
