"""Bits per parameter in the report, against the definition; absent in worlds of less than 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import DENSE_PARAMS, EXPOSURES, write_json, write_run

from analysis.comparisons.grid import Comparisons
from analysis.figures.context import context
from analysis.records.grid_data import load
from analysis.report.blocks import to_markdown
from analysis.report.build import build


def page(results: Path) -> str:
    return to_markdown(build(context(Comparisons(load(results, None, "dense"))), [], []), results)


def test_bits_per_parameter_are_the_share_stored_of_all_bits_over_all_parameters(tmp_path: Path) -> None:
    people, e50 = 1500, 40.0
    for seed in (0, 1):
        name = write_run(tmp_path, "dense", "w32", seed, e50, stop_past=False)
        path = tmp_path / "runs" / name / "cell.json"
        record = json.loads(path.read_text())
        record["cell"]["data"]["people"] = people
        write_json(path, record)
    last = json.loads((path.parent / "train.jsonl").read_text().splitlines()[-1])["probe"]["storage"]
    expected = last["bits"] / last["bits_max"] * people * 39.6116 / DENSE_PARAMS["w32"]
    row = next(line for line in page(tmp_path).splitlines() if line.startswith("| w32 | dense | 2 | 64.0 | 50,000 |"))
    assert float(row.split("|")[-4]) == pytest.approx(people * 39.6116 / DENSE_PARAMS["w32"], rel=5e-3)
    assert float(row.split("|")[-2]) == pytest.approx(expected, rel=5e-3)
    assert EXPOSURES[-1] == 64


def test_worlds_that_a_model_could_store_have_no_bits_per_parameter(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", "w32", 0, 40.0)
    assert "Bits per parameter" not in page(tmp_path)
