"""Another process scores retained checkpoints during training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.evaluate.harness import evaluate
from suite.grids import load_cell
from suite.launch import background_scoring, worker
from suite.launch.scorer import Scorer
from suite.records import RunDir, run_dir
from suite.train.loop import train

CELL = {
    "model": {"family": "dense", "base": "w32"},
    "data": {"kind": "bios", "people": 30, "questions": 0.5},
    "train": {
        "batch_rows": 4,
        "epochs": 8,
        "lr": 5e-3,
        "checkpoint_every": 4,
        "evaluate_every": 8,
        "keep_checkpoints": 1,
    },
    "evaluate": [{"tasks": ["bios_storage"], "limit": 20}],
}


def prepared_run(tmp_path: Path) -> tuple[RunDir, Cell]:
    cell = Cell.model_validate(CELL)
    run = run_dir(tmp_path / "results", cell)
    run.path.mkdir(parents=True)
    run.write_cell(cell)
    return run, cell


def step_scores(run: RunDir) -> dict[int, dict]:
    scores = [json.loads(path.read_text()) for path in (run.path / "eval" / "steps").glob("*.json")]
    return {one["step"]: one for one in scores}


def test_every_retained_checkpoint_has_the_scores_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cell = prepared_run(tmp_path)
    weights = {}
    load = background_scoring.load_model

    def remembering(folder: RunDir, *arguments):
        (step,) = (int(path.name.removeprefix("step-")) for path in folder.checkpoints.iterdir())
        weights[step] = load(folder, *arguments)
        return weights[step]

    monkeypatch.setattr(background_scoring, "load_model", remembering)
    assert worker.run_cell(run.path) == "done", run.state()
    last = run.train_lines()[-1]["step"]
    scores = step_scores(run)
    assert sorted(scores) == list(range(8, last, 8))
    corpus = prepare(cell.data, tmp_path / "results" / "cache")
    for step, model in weights.items():  # those that the training process scored at its end
        assert evaluate(model, corpus, cell.evaluate[0])["tasks"] == scores[step]["tasks"]
        assert scores[step]["tokens"] == step * 4 * cell.data.seq_len
    (final,) = (run.path / "eval").glob("*.json")
    assert json.loads(final.read_text())["step"] == last
    assert not background_scoring.retained_steps(run)
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{last}"]


def test_the_scoring_process_scores_retained_checkpoints_until_its_input_ends(tmp_path: Path) -> None:
    run, cell = prepared_run(tmp_path)
    corpus = prepare(cell.data, tmp_path / "results" / "cache")
    with background_scoring.scored_in_background(run, cell, Scorer()) as retain:
        train(cell, corpus, run, should_stop=lambda: bool(retain()))
        deadline = time.monotonic() + 120
        while background_scoring.retained_steps(run) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not background_scoring.retained_steps(run)
    assert sorted(step_scores(run)) == list(range(8, run.train_lines()[-1]["step"], 8))


def test_only_checkpoints_can_be_scored(tmp_path: Path) -> None:
    cell = json.loads(json.dumps(CELL))
    cell["train"]["evaluate_every"] = 6
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    with pytest.raises(UserError, match=r"train.evaluate_every: got 6, allowed: a multiple of checkpoint_every \(4\)"):
        load_cell(tmp_path / "cell.json")


def test_evaluate_every_is_not_part_of_a_runs_identity() -> None:
    cell = Cell.model_validate(CELL)
    often = cell.model_copy(update={"train": cell.train.model_copy(update={"evaluate_every": 4})})
    assert often.hash8 == cell.hash8
