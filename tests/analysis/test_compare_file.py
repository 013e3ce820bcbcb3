"""The `compare` verb on tables whose truth is known, and one line for every fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.cli.main import main

COLUMNS = "family=kind,cell=size,seed=seed,C=flops,y=loss,params=params"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Dense and memory, worth three times the compute, five seeds each; moe with three."""
    generator, rows = np.random.default_rng(0), []
    for rank, flops in enumerate(np.geomspace(1e18, 1e21, 6)):
        for seed in range(5):
            shared = generator.normal(0, 0.002)
            for kind, worth in (("dense", 1.0), ("memory", 3.0), ("moe", 1.6)):
                if kind != "moe" or seed < 3:
                    loss = (1.7 + 2e3 * (worth * flops) ** -0.2) * np.exp(shared + generator.normal(0, 0.001))
                    rows.append((kind, f"size{rank}", seed, flops, loss, 1e9 * worth))
    return pd.DataFrame(rows, columns=["kind", "size", "seed", "flops", "loss", "params"])


def call(table: pd.DataFrame, path: Path, *options: str) -> int:
    table.to_csv(path / "runs.csv", index=False)
    return main(["compare", "--data", str(path / "runs.csv"), *options])


def test_labels_are_those_of_the_file(table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = table.assign(kind=table["kind"].map({"dense": "None", "memory": "NA", "moe": "moe"}), size=124_000_000)
    renamed = renamed[renamed["flops"] == renamed["flops"].min()]
    columns = COLUMNS.replace("C=flops,", "")
    assert call(renamed, tmp_path, "--columns", columns, "--reference", "None", "--json") == 0
    found = json.loads(capsys.readouterr().out)["differences"]
    assert {(item["family"], item["cell"]) for item in found} == {("NA", "124000000"), ("moe", "124000000")}


def test_paired_differences_are_scipys_and_the_multiplier_the_known_one(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(table, tmp_path, "--columns", COLUMNS, "--primary", "memory:size1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first = next(item for item in found["differences"] if item["primary"])
    wide = table[table["size"] == "size1"].pivot(index="seed", columns="kind", values="loss")
    test = stats.ttest_rel(wide["memory"], wide["dense"])
    ends = test.confidence_interval()
    assert (first["low"], first["high"], first["p"]) == pytest.approx((ends.low, ends.high, test.pvalue))
    assert first["ratios"] == {"C": 1.0, "params": 3.0}
    assert first["equal_flop"] is True
    others = [item["p"] for item in found["differences"] if item["p"] is not None and not item["primary"]]
    adjusted = [item["p_holm"] for item in found["differences"] if item["p"] is not None and not item["primary"]]
    assert min(adjusted) == pytest.approx(len(others) * min(others))
    known = {(item["family"], item["cell"]): item for item in found["multipliers"]}
    memory = known["memory", "size1"]
    assert memory["low"] < 3 < memory["high"]
    assert known["moe", "size1"]["value"] == pytest.approx(1.6, rel=0.15)
    assert known["moe", "size1"]["low"] is None


def test_the_pooled_difference_is_that_of_least_squares_with_an_effect_per_cell(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven = table[~((table["size"] == "size0") & (table["seed"] > 2))]
    columns = COLUMNS.replace("C=flops,", "")
    assert call(uneven, tmp_path, "--columns", columns, "--json") == 0
    found = {item["family"]: item for item in json.loads(capsys.readouterr().out)["pooled"]}
    wide = uneven.pivot(index=["size", "seed"], columns="kind", values="loss")
    for family, pairs in (("memory", 28), ("moe", 18)):
        y = (wide[family] - wide["dense"]).dropna()
        cells = pd.get_dummies(y.index.get_level_values("size")).to_numpy(float)
        effects, squares, *_ = np.linalg.lstsq(cells, y.to_numpy(), rcond=None)
        free, weights = len(y) - cells.shape[1], np.full(cells.shape[1], 1 / cells.shape[1])
        error = np.sqrt(squares[0] / free * weights @ np.linalg.inv(cells.T @ cells) @ weights)
        low, high = stats.t.interval(0.95, free, effects.mean(), error)
        assert (found[family]["pairs"], found[family]["cells"]) == (pairs, 6)
        assert [found[family][name] for name in ("difference", "low", "high")] == pytest.approx(
            [effects.mean(), low, high], rel=1e-9
        )
    one_cell = table[table["size"] == "size0"]
    assert call(one_cell, tmp_path, "--columns", columns) == 0
    assert "over" not in capsys.readouterr().out, "one cell is not pooled"


def test_runs_of_one_budget_are_one_cell_by_default(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(table, tmp_path, "--columns", "family=kind,C=flops,y=loss") == 0
    out = capsys.readouterr().out
    assert out.count("compute multiplier of memory") == 6
    assert "extrapolated" in out
    assert "pairs" not in out.rsplit("\n95 %", 1)[0]


def test_a_cell_of_several_budgets_has_no_multiplier(
    table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their mean compute and mean loss lie on no curve."""
    assert call(table, tmp_path, "--columns", "family=kind,cell=kind,C=flops,y=loss") == 0
    assert (
        "no compute multiplier: compute multiplier: cell memory spans 1e+18 to 1e+21 FLOPs" in capsys.readouterr().out
    )


def test_a_reader_that_closes_the_pipe_early_is_not_an_error(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "runs.csv", index=False)
    command = [sys.executable, "-m", "analysis", "compare", "--data", str(tmp_path / "runs.csv"), "--columns", COLUMNS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "family=kind,y=loss"], "C (for the compute multiplier) or seed"),
        (["--columns", "y=loss,C=flops"], "family is missing (names of families)"),
        (["--columns", "family=kind,y=loss,seed=seed"], "cell is missing: what pairs share"),
        (["--columns", "family=kind,y=loss,C=flops,z=1"], "got 'z'; allowed: family, y"),
        (["--columns", "family=kind,y=-loss,C=flops"], "y must be finite and above 0"),
        (["--columns", "family=kind,y=kind,C=flops"], "'dense' is not a number"),
        (["--columns", "family=kind,y=loss,C=flops", "--reference", "pkm"], "got 'pkm', allowed: dense, memory, moe"),
        (["--columns", "family=kind,y=loss,C=flops", "--where", "kind == 'dense'"], "nothing to compare"),
        (["--columns", "family=kind,cell=1,seed=seed,y=loss"], "two runs of memory at cell 1 and seed 0, allowed"),
        (["--columns", COLUMNS, "--primary", "memory"], "--primary: got 'memory', allowed: memory:size0"),
        (["--columns", COLUMNS, "--bootstrap", "0"], "--bootstrap: allowed: 1 or more"),
    ],
)
def test_faults_of_compare_are_one_line_and_exit_2(
    table: pd.DataFrame, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(table, tmp_path, *options) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert message in shown.err
