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
from suite.launch.scoring import corpus_of, evaluate_run
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
    corpus.unlink()
    assert corpus_of(target, target.read_cell()).tokenizer.fingerprint == tokenizer.fingerprint
    return target


def test_a_moved_run_has_its_tokenizer_and_names_what_it_lacks(moved: RunDir) -> None:
    cell = moved.read_cell()
    corpus = corpus_of(moved, cell)
    assert corpus.fingerprint == moved.read_record()["data_fingerprint"]
    with pytest.raises(UserError, match="does not exist"):
        corpus.loader(0, 4)
    with pytest.raises(UserError, match="does not exist"):
        evaluate_run(moved.path, (EvalConfig(tasks=("held_out",)),), Scorer())
    moved.tokenizer_path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        corpus_of(moved, cell)
