"""Models under torch.compile: no graph breaks, no compiling after the first step, and the losses of plain ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from parallel_jobs import cell_of, job, run_jobs
from tiny_cells import corpus_of, tiny_cell
from torch._dynamo.utils import counters

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.models import registry
from suite.records import RunDir
from suite.train.loop import Trainer


def trainer_of(cell: Cell, cache: Path, folder: Path) -> Trainer:
    folder.mkdir()
    return Trainer(cell, corpus_of(cell, cache), RunDir(folder))


def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as torch.compile does, and run the graphs as they are: no compiler takes part."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("family", [*registry.families(), "moe_topk softmax"])
def test_no_graph_breaks_and_nothing_is_traced_after_the_first_step(
    family: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced(monkeypatch)
    trainer = trainer_of(tiny_cell(family, compile=True), cache, tmp_path / "run")
    trainer.train_step()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for rows in range(2, 4):
        with torch.no_grad():
            trainer.model.eval()(torch.zeros(rows, 5, dtype=torch.int64))  # a pass of other shapes
        trainer.train_step()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_layers_of_a_deep_model_share_their_graphs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More layers than dynamo's limit of recompilations; the number of a layer is traced as a variable."""
    traced(monkeypatch)
    cell = tiny_cell("memory_plus", compile=True)
    model = cell.model.model_dump() | {"layers": 12, "placement": (3, 6, 9)}
    trainer = trainer_of(Cell.model_validate(cell.model_dump() | {"model": model}), cache, tmp_path / "run")
    trainer.train_step()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 4
    trainer.train_step()
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_feed_forward_next_to_a_memory_is_compiled(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def recording(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recording))
    trainer = trainer_of(tiny_cell("ultramem_v2", compile=True), cache, tmp_path / "run")
    trainer.train_step()
    assert any("silu" in target for target in compiled)


@pytest.mark.slow
def test_two_processes_compile_what_they_train(cache: Path, tmp_path: Path) -> None:
    """Under FSDP2, in float32: sums of fused products are rounded otherwise. Every process asserts that it compiled."""
    cells = {(case, on): cell_of(case, 4, compile=on) for case in ("dense", "ultramem_v2") for on in (False, True)}
    prepare(cells["dense", False].data, cache)
    jobs = [job(cell, tmp_path / f"{case}-{on}", dtype="float32") for (case, on), cell in cells.items()]
    run_jobs(jobs, cache, 2, tmp_path)
    for case in ("dense", "ultramem_v2"):
        plain, compiled = (
            [line["loss"] for line in RunDir(tmp_path / f"{case}-{on}").train_lines() if "loss" in line]
            for on in (False, True)
        )
        assert len(plain) == 4
        assert compiled == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("wide")  # in float32 roundings of gradients near Adam's eps grow to 2e-4 in three steps
@pytest.mark.parametrize("family", ["memory_plus", "moe_topk"])
def test_a_compiled_model_trains_like_an_uncompiled_one(family: str, cache: Path, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        trainer = trainer_of(tiny_cell(family, compile=compiled), cache, tmp_path / str(compiled))
        losses.append([trainer.train_step()["loss"] for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
