"""Bytes that decoding a token reads from the device, the host and the file, as planned and as counted by the reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from suite import models
from suite.cells import Cell
from suite.cli.main import app
from suite.errors import UserError
from suite.inference.tables.costs import account_of_cell, bytes_by_source
from suite.inference.tables.loading import Place, load_stored
from suite.inference.tables.reading import reduce_tables, traffic
from suite.models.accounting import account, meta_model

MODELS = {
    "memory_plus": {"half_keys": 8, "top_k": 4, "memory_heads": 1, "placement": [1, 3]},
    "engram": {"head_rows": 40, "hash_heads": 2},
}


def cell_of(family: str, **fields: object) -> Cell:
    train = {"batch_rows": 4, "epochs": 2.0, "lr": 5e-3} | dict(fields.pop("train", {}))  # type: ignore[call-overload]
    model = {"family": family, "base": "w32", **MODELS.get(family, {})}
    return Cell.model_validate({"model": model, "data": {"kind": "bios", "people": 20}, "train": train, **fields})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("form", [None, "bf16", "int8", "fp8", "int4", "nf4"])
@pytest.mark.parametrize("source", ["host", "file"])
def test_planned_bytes_are_those_that_decoding_a_token_reads(
    family: str, form: str | None, source: str, tmp_path: Path
) -> None:
    cell, path = cell_of(family, quantised=form), tmp_path / "model.pt"
    model = models.build(cell.model, 50, seed=0).eval()
    if form is not None:
        reduce_tables(model, cell.quantised)
    torch.save(model.state_dict(), path)
    place = Place(source)  # type: ignore[arg-type]
    stored = load_stored(cell.model, 50, torch.load(path, mmap=True), path, cell.quantised, place)
    with torch.inference_mode():
        stored(torch.tensor([[7]]), cache=stored.new_cache(1, 2))
    read, planned = traffic(stored), bytes_by_source(cell, meta_model(cell.model, 50), source)
    assert {name: getattr(read, name) for name in ("host", "file")} == {
        name: planned[name] for name in ("host", "file")
    }
    assert planned[source] > 0


def test_the_device_reads_bf16_weights_and_rows_in_their_form() -> None:
    plain, int8, bf16 = (cell_of("memory_plus", quantised=form) for form in (None, "int8", "bf16"))
    model = meta_model(plain.model, 50)
    total = account(plain.model, 50, plain.data.seq_len).bytes_per_token
    rows = 2 * 4  # layers x top_k
    assert account_of_cell(plain, model).bytes_per_token == account_of_cell(bf16, model).bytes_per_token == total
    assert account_of_cell(int8, model).bytes_per_token == total - rows * (2 * 32 - 36)
    assert bytes_by_source(int8, model, None) == {"device": total - rows * (64 - 36), "host": 0.0, "file": 0.0}
    without = {bytes_by_source(cell, model, "host")["device"] for cell in (plain, int8)}
    assert without == {total - rows * 64}
    trained_in_bf16 = cell_of("memory_plus", train={"value_precision": "bf16"})
    assert bytes_by_source(trained_in_bf16, model, "host")["host"] == rows * 64


def grid(tmp_path: Path, family: str) -> str:
    axes = {"quantised": [None, "int8"]} if family in MODELS else {"seed": [0, 1]}
    content = {
        "defaults": {
            "model": {"family": family, "base": "w32", **MODELS.get(family, {})},
            "data": {"kind": "bios", "people": 20},
            "train": {"batch_rows": 4, "tokens": 25600, "lr": 5e-3},
        },
        "blocks": [{"axes": axes}],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_suite_plan_shows_bytes_by_source_and_no_training_of_quantised_cells(tmp_path: Path) -> None:
    arguments = ["plan", grid(tmp_path, "memory_plus"), "--table", "file", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    trained, int8 = document["cells"]
    assert document["assumed"]["table"] == "file"
    assert [cell["bytes_per_token_by_source"]["file"] for cell in (trained, int8)] == [8 * 128, 8 * 36]
    devices = {cell["bytes_per_token_by_source"]["device"] for cell in (trained, int8)}
    assert devices == {trained["bytes_per_token"] - 8 * 64}
    assert (int8["steps"], int8["total_flops"], int8["gpu_hours"], int8["table_hours"]) == (0, 0, 0, 0)
    assert document["totals"]["total_flops"] == trained["total_flops"] > 0
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"}).stdout
    assert "device kB/token" in shown
    assert "file kB/token" in shown
    assert "host kB/token" not in shown


@pytest.mark.parametrize(("family", "place"), [("memory_plus", "disk"), ("dense", "file")])
def test_a_place_that_no_table_can_have_is_refused(family: str, place: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", grid(tmp_path, family), "--table", place, "--results", str(tmp_path)])
    assert isinstance(done.exception, UserError)
    assert f"--table: got {place!r}" in str(done.exception)
