"""The published tables hold the papers' numbers and load into the frame."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from analysis.records import published
from analysis.records.frame import COLUMNS, read_published

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "published"
COLLECTED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")).parent / "paper" / "published"


def frame(name: str) -> pd.DataFrame:
    return read_published(FOLDER / f"{name}.csv")


def test_every_table_loads_into_the_frame_with_its_sources() -> None:
    paths = sorted(FOLDER.glob("*.csv"))
    assert len(paths) == 20
    for path in paths:
        table = read_published(path)
        assert list(table.columns) == COLUMNS
        assert table[["value", "source", "confidence", "task", "metric"]].notna().all(axis=None), path
        assert (table["split"] == "published").all()


@pytest.mark.parametrize(
    ("family", "base", "rows", "task", "value", "total"),
    [
        ("dense", "1.3b", 0, "nq_open", 0.0776, 1.3e9),
        ("moe", "1.3b", 0, "triviaqa", 0.3146, 3.545e9),
        ("peer", "134m", 768**2, "nq_open", 0.0246, 1.037e9),
        ("pkm", "1.3b", 2**20, "triviaqa", 0.3947, 3.377e9),
        ("memory_plus", "1.3b", 2**26, "triviaqa", 0.6214, 138.748e9),
    ],
)
def test_table_1_holds_the_printed_numbers(
    family: str, base: str, rows: int, task: str, value: float, total: float
) -> None:
    table = frame("memory_layers_table1")
    found = table[
        (table["family"] == family) & (table["base"] == base) & (table["memory_rows"] == rows) & (table["task"] == task)
    ]
    assert found["value"].tolist() == [value]
    assert found["params_total"].iloc[0] == pytest.approx(total)
    assert found["tokens"].iloc[0] == 1e12


@pytest.mark.parametrize(
    ("name", "task", "model", "value"),
    [
        ("stem", "ARC-E", "dense", 0.5766),  # printed as 57.66
        ("overtokenized", "5-task mean", "OLMoE baseline", 0.51),  # printed as a share
        ("smf", "TriviaQA 1K", "full SGD lr=2e-1", 0.65),
        ("sparse_memory_lm", "MMLU 0-shot", "Qwen3.5-0.8B frozen", 0.497),
    ],
)
def test_accuracies_are_shares_whether_printed_as_shares_or_out_of_100(
    name: str, task: str, model: str, value: float
) -> None:
    table = pd.read_csv(FOLDER / f"{name}.csv")
    found = table[(table["task"] == task) & (table["model"] == model) & table["metric"].isin(("acc", "f1"))]
    assert value in found["value"].tolist()


def test_the_traps_are_noted_on_their_rows() -> None:
    table1 = pd.read_csv(FOLDER / "memory_layers_table1.csv")
    copied = table1[table1["note"].fillna("").str.contains("copied")]
    assert set(copied["family"]) == {"memory_plus"}
    assert set(copied["memory_rows"]) == {2**20}
    figure1 = pd.read_csv(FOLDER / "memory_layers_figure1.csv")
    first = figure1[figure1["note"].fillna("").str.contains("vanilla")]
    assert set(first["memory_rows"]) == {2**20}
    assert set(first["family"]) == {"pkm"}
    for table, value in ((table1, 0.5867), (figure1, 0.59)):
        read = table[table["note"].fillna("").str.contains("58.67")]
        assert read[["task", "memory_rows", "value"]].to_numpy().tolist() == [["triviaqa", 2**24, value]]
    ablations = pd.read_csv(FOLDER / "memory_layers_ablations.csv")
    assert ablations["note"].str.contains("misalign").all()


def test_the_description_of_a_memory_in_a_source_is_retained() -> None:
    notes = set(pd.read_csv(FOLDER / "ultramemv2.csv")["note"].dropna())
    assert "memory: knum 1138, 4 layers shared" in notes


def test_the_committed_tables_are_what_the_collected_ones_give() -> None:
    if not COLLECTED.is_dir():
        pytest.skip(f"the collected tables are not at {COLLECTED}")
    for path in sorted(FOLDER.glob("*.csv")):
        made = published.normalise(pd.read_csv(COLLECTED / path.name))
        assert made.to_csv(index=False) == path.read_text(), path.name
