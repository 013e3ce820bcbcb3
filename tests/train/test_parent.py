"""Runs that start from the weights of another run: what is copied, what is fresh, and one line for every mistake."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cells import corpus_of, tiny_cell

from suite import models
from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.launch import worker
from suite.launch.branches import must_wait
from suite.launch.checks.cells import refuse_missing_parents
from suite.launch.preparation import prepare
from suite.launch.scorer import Scorer
from suite.records import RunDir
from suite.train.checkpoint import load_model, steps_saved
from suite.train.loop import Trainer, train


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with a trained dense and a trained Memory+ run."""
    folder = tmp_path_factory.mktemp("results")
    for family in ("dense", "memory_plus"):
        assert worker.run_cell(prepare(folder, parent_cell(family)).path) == "done"
    return folder


def parent_cell(family: str) -> Cell:
    return tiny_cell(family, epochs=1.0)


def child_of(parent: str, family: str, seed: int = 3, **train: Any) -> Cell:
    return tiny_cell(family, seed=seed, **{"epochs": 1.0, "init_from": "parent", **train}).starting_from(
        parent_cell(parent).hash8
    )


def weights_of(results: Path, family: str) -> dict[str, torch.Tensor]:
    cell = parent_cell(family)
    return load_model(RunDir(results / "runs" / cell.run_name), cell, corpus_of(cell, results / "cache")).state_dict()


def trainer_of(results: Path, cell: Cell) -> Trainer:
    return Trainer(cell, corpus_of(cell, results / "cache"), prepare(results, cell))


@pytest.mark.parametrize("family", ["dense", "memory_plus"])
def test_a_child_starts_with_the_weights_of_its_parent(family: str, results: Path) -> None:
    trainer = trainer_of(results, child_of(family, family))
    expected = weights_of(results, family)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_parent_without_its_last_checkpoint_is_refused(results: Path, tmp_path: Path) -> None:
    parent = RunDir(tmp_path / "runs" / parent_cell("dense").run_name)
    shutil.copytree(results / "runs" / parent.name, parent.path)
    *_, last = steps_saved(parent)
    (parent.checkpoints / f"step-{last}").rename(parent.checkpoints / f"step-{last - 1}")
    run = prepare(tmp_path, child_of("dense", "dense"))
    with pytest.raises(UserError, match=rf"the last step, {last}, is damaged or missing; suite train {parent.path}/"):
        worker.begin(run, run.read_cell(), corpus_of(run.read_cell(), results / "cache"), Scorer())


def test_parts_that_the_parent_lacks_start_fresh_and_are_named(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = child_of("dense", "memory_plus")
    run = prepare(results, cell)
    corpus = corpus_of(cell, results / "cache")
    worker.begin(run, cell, corpus, Scorer())
    record = run.read_record()["started_from"]
    assert record["hash"] == cell.train.parent
    assert "tables.0.weight" in record["fresh"]
    assert "layers.1.feed_forward.w1.weight" in record["unused"]
    line = capsys.readouterr().err.splitlines()[0]
    assert "fresh: " in line
    assert "layers.1.feed_forward" in line
    fresh = models.build(cell.model, corpus.vocab_size, cell.seed).state_dict()
    parent = weights_of(results, "dense")
    for name, tensor in Trainer(cell, corpus, run).model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in record["fresh"] else parent[name]), name


def test_a_killed_child_resumes_to_the_same_weights(results: Path, tmp_path: Path) -> None:
    """The parent may be deleted once the child has a checkpoint."""
    cell = child_of("memory_plus", "memory_plus", seed=4, checkpoint_every=2)
    corpus = corpus_of(cell, results / "cache")
    whole, killed = prepare(results, cell), RunDir(results / "runs" / "killed")
    killed.write_cell(cell)
    assert train(cell, corpus, whole) == "done"
    steps = iter([False, False, False, True])
    assert train(cell, corpus, killed, should_stop=lambda: next(steps)) == "interrupted"
    assert steps_saved(killed) == [2, 3]
    moved = tmp_path / "killed"
    killed.path.rename(moved)
    assert train(cell, corpus, RunDir(moved)) == "done"
    expected = load_model(whole, cell, corpus).state_dict()
    for name, tensor in load_model(RunDir(moved), cell, corpus).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_parent_may_be_at_a_path(results: Path, tmp_path: Path) -> None:
    path = str(results / "runs" / parent_cell("dense").run_name)
    cell = child_of("dense", "dense", init_from=path)
    run = prepare(tmp_path, cell)
    trainer = Trainer(cell, corpus_of(cell, results / "cache"), run)
    assert torch.equal(trainer.model.state_dict()["norm.weight"], weights_of(results, "dense")["norm.weight"])


def test_a_missing_or_untrained_parent_is_one_line(results: Path, tmp_path: Path) -> None:
    cell = child_of("dense", "dense")
    with pytest.raises(UserError, match=r"^train.init_from: got 'parent': the run [0-9a-f]{8} is not in ") as caught:
        trainer_of(tmp_path, cell)
    assert "\n" not in str(caught.value)
    prepare(tmp_path, parent_cell("dense"))
    with pytest.raises(UserError, match=r"^train.init_from: got 'parent': .* is not trained to its end"):
        trainer_of(tmp_path, cell)


def test_a_parent_of_another_shape_is_one_line(results: Path) -> None:
    cell = child_of("memory_plus", "memory_plus")
    model = cell.model.model_copy(update={"half_keys": 8})
    with pytest.raises(UserError, match=r"keys of shape \[4, 2, 16, 8\], this model needs \[4, 2, 8, 8\]"):
        trainer_of(results, cell.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"heads": 4}, r"^model.heads: got 4, allowed: 2, the attention heads of the parent .*dense-w32"),
        (
            {"base": "373m", "layers": 4, "dim": 32, "heads": 2, "kv_heads": 2, "ffn_hidden": 96},
            r"^model.base: got '373m', whose rotary positions have base 500000, allowed: 134m, .*, with base 10000",
        ),
    ],
)
def test_a_parent_of_equal_shapes_with_another_attention_is_one_line(
    model: dict[str, Any], words: str, results: Path
) -> None:
    cell = child_of("dense", "dense")
    fields = cell.model.model_dump() | {"kv_heads": model.get("heads")} | model
    with pytest.raises(UserError, match=words) as caught:
        trainer_of(results, cell.model_copy(update={"model": type(cell.model).model_validate(fields)}))
    assert "\n" not in str(caught.value)


def test_a_parent_with_another_tokenizer_is_one_line(results: Path) -> None:
    cell = child_of("dense", "dense")
    tokenizer = cell.data.tokenizer.model_copy(update={"kind": "bytes"})
    with pytest.raises(UserError, match=r"^data.tokenizer: differs from that of the parent"):
        trainer_of(results, cell.model_copy(update={"data": cell.data.model_copy(update={"tokenizer": tokenizer})}))


def test_a_cell_waits_for_its_parent_and_fails_with_one_line_if_the_parent_failed(tmp_path: Path) -> None:
    parent, child = parent_cell("dense"), child_of("dense", "dense")
    run = prepare(tmp_path, child)
    assert must_wait(child, run, [parent])
    assert not must_wait(child, run, [child])
    prepare(tmp_path, parent).set_state("failed", cause="loss is nan")
    assert worker.run_cell(run.path) == "failed"
    assert "is not trained to its end" in run.state()["cause"]


def test_a_sweep_refuses_a_missing_parent_before_it_trains_anything(tmp_path: Path) -> None:
    parent, child = parent_cell("dense"), child_of("dense", "dense")
    refuse_missing_parents(Grid("both", tmp_path / "both.yaml", (parent, child)), tmp_path)
    with pytest.raises(UserError, match=r"alone.yaml: train.init_from: got 'parent'"):
        refuse_missing_parents(Grid("alone", tmp_path / "alone.yaml", (child,)), tmp_path)
