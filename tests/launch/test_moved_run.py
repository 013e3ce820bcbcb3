"""A run that is moved without its corpus and cache can still be exported and scored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_cells import tiny_cell

from suite.cells import Cell, EvalConfig
from suite.errors import UserError
from suite.launch.preparation import prepare
from suite.launch.scorer import Scorer
from suite.launch.scoring import corpus_of, evaluate_run, score_runs
from suite.launch.worker import run_cell
from suite.records import RunDir


@pytest.fixture
def moved(tmp_path: Path) -> RunDir:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"Line {number} of a text that repeats itself.\n\n" for number in range(2000)))
    data: dict[str, Any] = {"kind": "text", "path": str(corpus), "seq_len": 32}
    data["tokenizer"] = {"kind": "bpe", "vocab_size": 270}
    cell = Cell.model_validate(tiny_cell(epochs=None, tokens=512).model_dump() | {"data": data})
    cell = cell.model_copy(update={"data": cell.data.identified()})
    run = prepare(tmp_path / "results", cell)
    assert run_cell(run.path) == "done", run.state()
    tokenizer = corpus_of(run, cell).tokenizer
    target = RunDir(tmp_path / "elsewhere" / "runs" / run.name)
    shutil.copytree(run.path, target.path)
    shutil.rmtree(tmp_path / "results")
    corpus.rename(corpus.with_name("moved.txt"))
    assert corpus_of(target, target.read_cell()).tokenizer.fingerprint == tokenizer.fingerprint
    return target


def test_a_moved_run_has_its_tokenizer_and_names_what_it_lacks(moved: RunDir) -> None:
    cell = moved.read_cell()
    corpus = corpus_of(moved, cell)
    assert corpus.fingerprint == moved.read_record()["data_fingerprint"]
    with pytest.raises(UserError, match="does not exist"):
        corpus.loader(0, 4)
    held_out = EvalConfig(tasks=("held_out",))
    with pytest.raises(UserError, match=r"does not exist.*name their new place in the grid, and score it: suite eval"):
        evaluate_run(moved.path, (held_out,), Scorer())
    moved.tokenizer_path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        corpus_of(moved, cell)


def test_a_grid_that_names_the_moved_files_scores_the_run(moved: RunDir, tmp_path: Path) -> None:
    cell, held_out = moved.read_cell(), EvalConfig(tasks=("held_out",))
    data = cell.data.model_copy(update={"path": str(tmp_path / "moved.txt")})
    of_grid = cell.model_copy(update={"data": data, "evaluate": (held_out,)})
    assert score_runs([(moved, of_grid)], Scorer(), lambda line: None) == ([], [])
    assert moved.has_eval(held_out.hash8)
    assert moved.read_cell() == cell.with_evaluations((held_out,))
