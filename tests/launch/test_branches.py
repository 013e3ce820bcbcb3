"""Decay branches have the weights and records of runs trained from the beginning, also after interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import killed_at
from sweep_processes import suite
from times import TIMES

from suite.cells import Cell
from suite.launch import branches, worker
from suite.launch.preparation import prepare
from suite.records import RunDir, run_dir
from suite.train import loop
from suite.train.checkpoint import steps_saved

STEP = 4 * 128  # tokens
BUDGETS = (10 * STEP, 20 * STEP, 30 * STEP)  # decay begins after 8, 16 and 24 steps


def cell(tokens: int, branches: tuple[int, ...] = BUDGETS) -> Cell:
    train = {"batch_rows": 4, "tokens": tokens, "lr": 5e-3, "warmup": 3, "log_every": 1, "checkpoint_every": 7}
    return Cell.model_validate(
        {
            "model": {"family": "memory_plus", "base": "w32", "half_keys": 16, "top_k": 4},
            "data": {"kind": "bios", "people": 30},
            "train": {**train, "schedule": "wsd", "keep_checkpoints": 1, "branches": list(branches)},
        }
    )


def run(results: Path, cell: Cell) -> RunDir:
    finished = prepare(results, cell)
    assert worker.run_cell(finished.path) == "done", finished.state()
    return finished


def outcome(made: RunDir) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    lines = [{name: value for name, value in line.items() if name not in TIMES} for line in made.train_lines()]
    newest = made.checkpoints / f"step-{steps_saved(made)[-1]}" / "state.pt"
    return lines, torch.load(newest, weights_only=True)["model"]


@pytest.fixture(scope="module")
def from_the_beginning(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    results = tmp_path_factory.mktemp("from-the-beginning")
    return {tokens: outcome(run(results, cell(tokens, branches=()))) for tokens in BUDGETS}


def assert_same(made: RunDir, expected: tuple[list[dict[str, Any]], dict[str, torch.Tensor]]) -> None:
    lines, weights = outcome(made)
    assert lines == expected[0]
    assert weights.keys() == expected[1].keys()
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)


@pytest.fixture
def steps_trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every step that is trained."""
    trained: list[int] = []
    real = loop.Trainer.train_step

    def counted(self: loop.Trainer) -> dict[str, float | None]:
        trained.append(self.step)
        return real(self)

    monkeypatch.setattr(loop.Trainer, "train_step", counted)
    return trained


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_branches_in_any_order_equal_runs_trained_from_the_beginning(
    order: tuple[int, ...], from_the_beginning: dict[int, Any], steps_trained: list[int], tmp_path: Path
) -> None:
    for index in order:
        assert_same(run(tmp_path, cell(BUDGETS[index])), from_the_beginning[BUDGETS[index]])
    # The longest stable phase once, and the decay phases of 2, 4 and 6 steps.
    assert len(steps_trained) == 24 + 2 + 4 + 6


def test_a_branch_records_the_run_it_started_from(tmp_path: Path) -> None:
    first = run(tmp_path, cell(BUDGETS[0]))
    second = run(tmp_path, cell(BUDGETS[1]))
    assert "branched_from" not in first.read_record()
    assert second.read_record()["branched_from"] == {"run": first.name, "step": 8}
    assert second.read_record()["hash"] == cell(BUDGETS[1], branches=()).hash8
    assert steps_saved(second) == [8, 16, 20], "the starts of branches are retained regardless of keep_checkpoints"


def test_an_interrupted_branch_resumes_bit_for_bit(from_the_beginning: dict[int, Any], tmp_path: Path) -> None:
    run(tmp_path, cell(BUDGETS[0]))
    made = prepare(tmp_path, cell(BUDGETS[2]))
    for step in (10, 18, 25):  # before its first own checkpoint (14), and after later ones
        with killed_at(step):
            worker.run_cell(made.path)
    assert worker.run_cell(made.path) == "done"
    assert_same(made, from_the_beginning[BUDGETS[2]])
    assert made.read_record()["branched_from"]["step"] == 8


def test_runs_made_by_other_code_or_of_other_cells_are_not_used(
    from_the_beginning: dict[int, Any], steps_trained: list[int], tmp_path: Path
) -> None:
    other = run(tmp_path, cell(BUDGETS[0]))
    record = other.read_record()
    other.cell_path.write_text(json.dumps({**record, "versions": {"code": "another"}}))
    run(tmp_path, cell(BUDGETS[0]).model_copy(update={"seed": 1}))
    steps_trained.clear()
    made = run(tmp_path, cell(BUDGETS[1]))
    assert steps_trained == list(range(20))
    assert_same(made, from_the_beginning[BUDGETS[1]])


def test_checkpoints_are_copied_where_links_are_not_supported(
    from_the_beginning: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("links are not supported")

    run(tmp_path, cell(BUDGETS[0]))
    monkeypatch.setattr(branches.os, "link", refuse)
    assert_same(run(tmp_path, cell(BUDGETS[1])), from_the_beginning[BUDGETS[1]])


def test_a_cell_waits_until_the_stable_phase_of_smaller_budgets_is_saved(tmp_path: Path) -> None:
    small, middle, large = (cell(tokens) for tokens in BUDGETS)
    other = large.model_copy(update={"seed": 1})

    def waiting(cell: Cell, unfinished: list[Cell]) -> bool:
        return branches.must_wait(cell, run_dir(tmp_path, cell), unfinished)

    cells = [large, middle, small, other]
    assert [waiting(one, cells) for one in cells] == [True, True, False, False]
    (run_dir(tmp_path, small).checkpoints / "step-8").mkdir(parents=True)
    assert [waiting(one, cells) for one in cells] == [True, False, False, False]
    assert not waiting(large, [large]), "cells do not wait for finished or failed ones"
    assert not waiting(cell(BUDGETS[2], branches=()), cells)


@pytest.mark.slow
def test_a_sweep_with_free_slots_trains_the_shared_steps_once(tmp_path: Path) -> None:
    grid = tmp_path / "wsd.yaml"
    grid.write_text(
        "defaults:\n"
        "  model: {family: dense, base: w32}\n"
        "  data: {kind: bios, people: 30}\n"
        f"  train: {{batch_rows: 4, lr: 5e-3, schedule: wsd, branches: {list(BUDGETS)}}}\n"
        f"blocks:\n  - axes: {{train.tokens: {list(reversed(BUDGETS))}}}\n"
    )
    done = suite("sweep", grid, "--results", tmp_path / "results", "--jobs", "3", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [RunDir(path).read_record() for path in (tmp_path / "results" / "runs").iterdir()]
    starts = {record["cell"]["train"]["tokens"]: record.get("branched_from") for record in records}
    assert [starts[tokens] and starts[tokens]["step"] for tokens in BUDGETS] == [None, 8, 16]
