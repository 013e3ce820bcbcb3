"""Runs with smaller tables: their records, their labels and the figure of loss against bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from run_folders import write_json, write_run

from analysis.comparisons.destinations.next_parameter import metric_of, steps
from analysis.comparisons.grid import Comparisons
from analysis.comparisons.paired import contrasts
from analysis.figures.context import LEGEND, Context, context
from analysis.figures.tables.usage import table_bytes, with_trained
from analysis.records.grid_data import GridData, load

SOURCE_BYTES = 16 * 16 * 32 * 4
CHANGES = {("int8", None): 0.001, ("int4", None): 0.02, (None, 0.25): 0.3, ("int8", 0.25): 0.31}
"""Form and share of rows -> difference of the loss from that of the trained run, in nats."""


def write_smaller(results: Path, source: str, form: str | None, kept: float | None, difference: float) -> None:
    """Write what suite quantise makes from a run whose loss is 2 nats."""
    folder = results / "runs" / source
    cell = json.loads((folder / "cell.json").read_text())
    name = "-".join(filter(None, [source, form, kept and f"keep{100 * kept:g}"]))
    cell["cell"] |= {"quantised": form, "kept_rows": kept}
    loss = {"value": 2.0 + difference, "reference": 2.0, "difference": difference, "stderr": difference / 10}
    tables = {"form": form, "bytes": SOURCE_BYTES * (kept or 0.3), "source_bytes": SOURCE_BYTES, "loss": loss}
    tables |= {} if kept is None else {"kept_rows": kept, "counted_tokens": 4096}
    write_json(results / "runs" / name / "cell.json", cell | {"started_from": {"run": source}, "tables": tables})
    last = (folder / "train.jsonl").read_text().splitlines()[-1]
    (results / "runs" / name / "train.jsonl").write_text(last + "\n")
    write_json(results / "runs" / name / "state.json", {"state": "done"})


def grid(root: Path) -> GridData:
    """Two seeds of dense and memory_plus, and every smaller table of the latter."""
    for seed in range(2):
        write_run(root, "dense", "w32", seed, 20.0)
        source = write_run(root, "memory_plus", "w32", seed, 15.0, half_keys=16)
        for (form, kept), difference in CHANGES.items():
            write_smaller(root, source, form, kept, difference * (1 + seed))
    return replace(load(root, fallback="dense"), grid="g")


def view(data: GridData) -> Context:
    return context(Comparisons(data))


def test_records_of_smaller_tables_are_read(tmp_path: Path) -> None:
    data = grid(tmp_path)
    names = data.runs[["run", "label", "trained_label"]].rename(columns={"run": "name"})
    tables = data.smaller_tables.join(names, on="run")
    assert len(tables) == 2 * len(CHANGES)
    assert (tables["source_bytes"] == SOURCE_BYTES).all()
    assert tables["trained_label"].unique().tolist() == ["memory_plus k16"]
    for (form, kept), difference in CHANGES.items():
        parts = [f"kept_rows={kept}"] * (kept is not None) + [f"quantised={form}"] * (form is not None)
        rows = tables[tables["label"] == " ".join(["memory_plus k16", *parts])]
        assert rows["loss"].tolist() == pytest.approx([2 + difference, 2 + 2 * difference])
        assert rows["stderr"].tolist() == pytest.approx([difference / 10, difference / 5])
        assert all(name.startswith(f"{source}-") for name, source in zip(rows["name"], rows["source"], strict=True))
    assert "memory_plus k16" in set(data.runs["label"])


def test_loss_is_drawn_against_table_bytes(tmp_path: Path) -> None:
    data = grid(tmp_path)
    points = with_trained(data.smaller_tables)
    trained = points[(points["form"] == "as trained") & (points["share"] == 1)]
    assert len(trained) == 2
    assert trained[["bytes", "loss", "change", "error"]].drop_duplicates().to_numpy().tolist() == [
        [SOURCE_BYTES, 2.0, 0.0, 0.0]
    ]
    int4 = points[points["form"] == "int4"]
    assert int4["change"].tolist() == pytest.approx([1.0, 2.0])  # 0.02 and 0.04 of 2 nats
    assert int4["error"].tolist() == pytest.approx([0.1, 0.2])
    drawn = next(path for path in table_bytes(view(data), tmp_path) if path.suffix == ".svg").read_text()
    assert ">memory_plus k16 (n=2)<" in drawn
    assert all(f">{form}<" in drawn for form in ("as trained", "int8", "int4"))
    assert not any(f">{form}<" in drawn for form in ("bf16", "nf4", "fp8"))
    assert drawn.count(">25<") == 2 * 2  # two forms, two panels


def test_a_grid_of_many_variants_draws_smaller_tables_in_their_own_figure_only(tmp_path: Path) -> None:
    for keys in range(LEGEND // len(CHANGES) + 1):
        source = write_run(tmp_path, "memory_plus", "w32", 0, 15.0, half_keys=16 + keys)
        for (form, kept), difference in CHANGES.items():
            write_smaller(tmp_path, source, form, kept, difference)
    write_run(tmp_path, "dense", "w32", 0, 20.0)
    data = replace(load(tmp_path, fallback="dense"), grid="g")
    drawn = view(data)
    assert data.done["label"].nunique() > LEGEND
    assert not set(drawn.table.index) & set(data.smaller_tables["run"])
    assert pd.Index(drawn.table["label"]).is_unique
    assert "figure of table bytes only" in drawn.remark
    assert "memory_plus k16 (n=1)" in table_bytes(drawn, tmp_path)[2].read_text()


def test_smaller_tables_are_neither_partners_nor_training_results(tmp_path: Path) -> None:
    """Next to their reference, whose plain runs alone are what others are compared with."""
    grid(tmp_path)
    for seed in range(2):
        write_run(tmp_path, "pkm", "w32", seed, 18.0, half_keys=16)
    data = replace(load(tmp_path, reference="memory_plus"), grid="g")
    runs = data.runs
    smaller = runs.index.isin(data.smaller_tables["run"])
    assert runs["smaller"].tolist() == smaller.tolist()
    assert (runs.loc[smaller, "e50_state"] == "none").all()
    assert (runs.loc[~smaller, "e50_state"] == "reached").all()
    assert not runs["smaller"].to_numpy()[runs["partner"]].any()
    sides = {(contrast.variant, contrast.reference) for contrast in contrasts(data)}
    assert {reference for _, reference in sides} == {"memory_plus k16"}
    assert {variant for variant, _ in sides} == {"dense", "pkm k16", *runs.loc[smaller, "label"]}
    labels = {step.label for step in steps(data, metric_of(data, None))}
    assert labels == {"dense", "pkm k16"}
