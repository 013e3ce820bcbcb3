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
from suite.models.accounting import meta_model
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
    lookups = run.sent.columns  # of which a part is gathered as well
    assert measured.sent["all-gather"] <= 1.1 * 2 * accumulate * measured.pass_weights + lookups
    elements = sum(part.weights for part in parts.parts)
    assert measured.sent["reduce-scatter"] <= 1.1 * accumulate * 4 * elements + lookups


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
