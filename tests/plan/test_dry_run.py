"""Plans compared with a step of rank 0 of their meshes, on fake CUDA tensors and a fake process group."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from suite.cells import Cell
from suite.cli.main import app
from suite.models.accounting import meta_model, rows_read
from suite.plan.activation_memory import StepTracer
from suite.plan.dry_run.report import dry_run
from suite.plan.fused_attention import Precision
from suite.plan.mesh import Mesh
from suite.plan.table_state import table_state

VOCABULARY = 128256
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None, reason="needs a C++ compiler"
)
MODELS: dict[str, dict[str, Any]] = {
    "memory_plus-8b": {"family": "memory_plus", "base": "8b", "half_keys": 4096},
    "moe-1.3b": {"family": "moe", "base": "1.3b"},
    "dense-8b": {"family": "dense", "base": "8b"},
    "moe_topk-134m": {"family": "moe_topk", "base": "134m", "experts": 16},
    "memory_plus-134m": {"family": "memory_plus", "base": "134m", "half_keys": 1024},
    "memory_plus-1.3b": {"family": "memory_plus", "base": "1.3b", "half_keys": 1024},
}


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("name", "gpus", "shards", "accumulate", "precision", "capability"),
    [
        ("memory_plus-8b", 64, 64, 1, "bf16", 9),
        ("moe-1.3b", 64, 1, 1, "bf16", 9),
        ("dense-8b", 64, 1, 1, "bf16", 9),
        ("moe_topk-134m", 8, 1, 1, "bf16", 8),  # experts in blocks: there are no grouped products below sm_90,
        pytest.param("moe_topk-134m", 8, 1, 1, "fp32", 9, marks=pytest.mark.slow),  # nor in fp32
        ("moe_topk-134m", 8, 1, 1, "bf16", 9),
        pytest.param("memory_plus-134m", 2, 2, 1, "bf16", 9, marks=pytest.mark.slow),  # most bytes are the table's
        pytest.param("memory_plus-1.3b", 16, 8, 2, "bf16", 9, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_rank_0_holds_and_sends_what_is_planned(
    name: str, gpus: int, shards: int, accumulate: int, precision: Precision, capability: int
) -> None:
    cell = Cell.model_validate(
        {
            "model": MODELS[name],
            "data": {"kind": "bios", "people": 40, "seq_len": 4096},
            "train": {"batch_rows": gpus * accumulate, "tokens": 10**9, "lr": 1e-4, "precision": precision},
        }
    )
    parts = StepTracer(meta_model(cell.model, VOCABULARY), 4096, precision, capability=capability).parts(1)
    run = dry_run(
        cell,
        VOCABULARY,
        Mesh(gpus, shards, 1, accumulate, parts.step(gpus, shards, accumulate, table_state(cell.train, on_gpu=True))),
        capability,
    )
    measured = run.measured
    print(f"{name}: {run.ratios}, {measured.cpu_s:.1f} CPU s")
    assert measured.peak == pytest.approx(run.mesh.memory.peak, rel=0.1)
    assert sum(measured.sent.values()) == pytest.approx(run.sent.total, rel=0.1)
    assert measured.weights <= 1.1 * measured.even_weights
    model, tokens = meta_model(cell.model, VOCABULARY), accumulate * 4096
    others = tokens * (shards - 1)  # of those that this process reads for, all but its own
    layers = model.memory_layers().values()
    rows = sum(rows_read(layer) * len(layer.tables) for layer in layers)
    width = sum(table.weight.shape[1] for layer in layers for table in layer.tables)
    assert measured.sent.get("all-to-all", 0) == 2 * 4 * others * width // shards  # columns and their gradients
    gathered = measured.sent["all-gather"] - others * rows * (4 + 4)  # int32 indices, fp32 weights
    assert gathered <= 1.1 * 2 * accumulate * measured.pass_weights
    reduced = measured.sent["reduce-scatter"] - others * rows * 4  # gradients of these weights
    assert reduced <= 1.1 * accumulate * 4 * sum(part.weights for part in parts.parts)


@NEEDS_COMPILER
@pytest.mark.parametrize("seq_len", [64, 128])
def test_replicas_send_the_planned_gradients_of_few_rows_or_of_the_whole_table(seq_len: int) -> None:
    """Two replicas of two column shards, and 2^16 rows. With 64 tokens a row there are fewer than 2^15 lookups."""
    cell = Cell.model_validate(
        {
            "model": {"family": "memory_plus", "base": "w32", "half_keys": 256, "top_k": 32, "memory_heads": 1},
            "data": {"kind": "bios", "people": 40, "seq_len": seq_len},
            "train": {"batch_rows": 4, "tokens": 10**9, "lr": 1e-4},
        }
    )
    model = meta_model(cell.model, 500)
    lookups = 4 * seq_len * 32 * len(model.memory_layers())
    memory = StepTracer(model, seq_len, "fp32", capability=9).parts(1).step(4, 2, 1, table_state(cell.train, True))
    run = dry_run(cell, 500, Mesh(4, 2, 1, 1, memory), 9)
    print(f"{run.ratios}, {lookups / 2**16:.2f} lookups a row, {run.measured.cpu_s:.1f} CPU s")
    assert (lookups >= 2**15) == (seq_len == 128)
    rows = lookups if seq_len == 64 else 2**16
    assert run.sent.replicas == rows * 4 * 32 / 2 + 2**16  # one byte for every row: whether any replica has read it
    small = run.measured.sent["all-reduce"] - run.sent.replicas  # norms
    assert 0 <= small < 100
    assert run.ratios["peak"] == pytest.approx(1, rel=0.1)
    assert run.ratios["sent"] == pytest.approx(1, rel=0.1)


@NEEDS_COMPILER
def test_the_command_compares_every_mesh_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("{name: small, memory: 1.5e9, flops: 1e14, bandwidth: 8e11, link: 3e10, price: 1}\n")
    Path("mesh.yaml").write_text(
        "defaults: {model: {base: 134m, family: memory_plus, half_keys: 64}, data: {kind: bios, people: 40},\n"
        "  train: {batch_rows: 64, tokens: 1000000, lr: 1e-4, precision: bf16}}\n"
        "blocks: [{axes: {seed: [0, 1]}}, {set: {model.base: w32}, axes: {seed: [0]}}]\n"
    )
    result = CliRunner().invoke(app, ["plan", "mesh.yaml", "--gpu", "small.yaml", "--dry-run-mesh", "--json"])
    assert result.exit_code == 0, result.output
    first, second, small = json.loads(result.stdout)["cells"]
    assert "dry_run" not in small
    assert first["dry_run"] == second["dry_run"]
    ratios = first["dry_run"]["ratios"]
    assert ratios["peak"] == pytest.approx(1, rel=0.1)
    assert ratios["sent"] == pytest.approx(1, rel=0.1)
    assert ratios["weights"] <= 1.1
