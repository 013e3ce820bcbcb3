"""What `train.trainable` moves, and that nothing else moves by a bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import model as small_model
from model_families import tokens
from pydantic import ValidationError
from tiny_cells import corpus_of, tiny_cell
from torch import Tensor

from suite.cells import Cell, TrainConfig
from suite.data.packing import IGNORED
from suite.errors import UserError
from suite.inference.batching import evaluation_mode
from suite.launch import worker
from suite.launch.preparation import prepare
from suite.records import RunDir
from suite.train.checkpoint import load_model
from suite.train.finetuning import lora
from suite.train.finetuning.rows import RowChoice
from suite.train.loop import Trainer, train
from suite.train.optim import Optimizer
from suite.trainable import TrainLoRA, TrainRows

SGD = {"table_optimizer": "sgd", "value_lr": 1.0}
ADAMW = {"value_lazy": True, "value_lr": 0.01}
ROWS = {"kind": "rows", "top": 2, "background": 4}
FAMILIES = ("dense", "moe_topk", "memory_plus", "peer", "pkm query_batchnorm")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for family in FAMILIES:
        assert worker.run_cell(prepare(folder, parent_cell(family)).path) == "done"
    return folder


def parent_cell(family: str) -> Cell:
    cell = tiny_cell(family, epochs=0.5)
    side = 64 if family == "memory_plus" else 12
    options = {"half_keys": side, "top_k": 2} if hasattr(cell.model, "half_keys") else {}
    return Cell.model_validate(cell.model_dump() | {"model": cell.model.model_dump() | options})


def child_of(family: str, trainable: dict[str, Any], **train: Any) -> Cell:
    parent = parent_cell(family)
    fields = parent.train.model_dump() | {"init_from": "parent", "parent": parent.hash8, "warmup": 0, "epochs": 1.0}
    return Cell.model_validate(parent.model_dump() | {"train": fields | {"trainable": trainable} | train, "seed": 5})


def trainer_of(results: Path, cell: Cell) -> Trainer:
    return Trainer(cell, corpus_of(cell, results / "cache"), prepare(results, cell))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.scope.tensors()["model"].items()}


def moved(trainer: Trainer, steps: int = 3) -> set[str]:
    before = state_of(trainer)
    for _ in range(steps):
        trainer.train_step()
    return {name for name, tensor in state_of(trainer).items() if not torch.equal(tensor, before[name])}


def row_parameters(trainer: Trainer) -> set[str]:
    return {name for name in trainer.model.state_dict() if name.startswith("tables.") or ".experts.w" in name}


@pytest.mark.parametrize(("kind", "options"), [("tables", SGD), ("tables", {}), ("rows", ADAMW)])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_only_tables_and_experts_move(family: str, kind: str, options: dict[str, Any], results: Path) -> None:
    trainer = trainer_of(results, child_of(family, ROWS if kind == "rows" else {"kind": kind}, **options))
    assert moved(trainer) == row_parameters(trainer)


@pytest.mark.parametrize(
    ("score", "options"),
    [("tfidf", SGD), ("tfidf", ADAMW), ("tf", ADAMW), ("reads", SGD), ("random", SGD)],
    ids=["tfidf-sgd", "tfidf-adamw", "tf", "reads", "random"],
)
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_only_the_chosen_rows_move(family: str, options: dict[str, Any], score: str, results: Path) -> None:
    trainable = {**ROWS, "score": score} | ({"top": None} if score == "reads" else {})
    trainer = trainer_of(results, child_of(family, trainable, **options))
    choice = trainer.scope.choice
    assert choice is not None
    for _ in range(3):
        before = state_of(trainer)
        trainer.train_step()
        after = state_of(trainer)
        for name in row_parameters(trainer):
            rows = (after[name] != before[name]).flatten(1).any(1).nonzero().squeeze(1)
            chosen = choice.is_chosen(name.rpartition(".")[0]).nonzero().squeeze(1)
            assert score == "reads" or len(chosen) == 2
            assert {*rows.tolist()} <= {*chosen.tolist()}
            assert len(rows) > 0


def test_the_pair_of_a_peer_expert_is_chosen_together(results: Path) -> None:
    trainer = trainer_of(results, child_of("peer", {**ROWS, "score": "random"}, **SGD))
    choice = trainer.scope.choice
    assert choice is not None
    trainer.train_step()
    assert torch.equal(choice.is_chosen("tables.0"), choice.is_chosen("tables.1"))


def rows_read(trainer: Trainer, batch: Any) -> list[list[int]]:
    """Return the rows of the only table that each real token reads, by a forward pass over one token sequence."""
    found: list[list[int]] = []
    table = trainer.model.memory_tables()[0]
    per_layer: list[Tensor] = []
    table.before_read.append(per_layer.append)
    with evaluation_mode(trainer.model):
        trainer.model.hidden(batch.tokens_BT, batch.segments_BT)
    table.before_read.pop()
    targets = batch.targets_BT.flatten().tolist()
    for indices_NS in per_layer:
        found += [row for row, target in zip(indices_NS.tolist(), targets, strict=True) if target != IGNORED]
    return found


def test_tfidf_equals_a_plain_implementation(results: Path) -> None:
    """Counts of a shared table add up over the layers that read it; padding does not count."""
    cell = child_of("memory_plus", {**ROWS, "top": 7, "background": 5}, batch_rows=1, **SGD)
    trainer = trainer_of(results, cell)
    loader = trainer.corpus.loader(cell.seed, cell.train.batch_rows)  # the parent has the same data
    background = [{row for rows in rows_read(trainer, loader.batch(step)) for row in rows} for step in range(5)]
    reads = [row for rows in rows_read(trainer, trainer.loader.batch(0)) for row in rows]
    scores = {
        row: reads.count(row) / len(reads) * math.log((5 + 1) / (sum(row in batch for batch in background) + 1))
        for row in set(reads)
    }
    best = sorted(scores, key=lambda row: (-scores[row], row))[:7]
    assert scores[best[6]] > 0
    trainer.train_step()
    assert trainer.scope.choice is not None
    assert trainer.scope.choice.is_chosen("tables.0").nonzero().squeeze(1).tolist() == sorted(best)


def test_named_parameters_move(results: Path) -> None:
    cell = child_of("memory_plus", {"kind": "parameters", "patterns": [r"layers\.0\.attention\..*", "norm.weight"]})
    assert moved(trainer_of(results, cell)) == {
        "norm.weight",
        *(f"layers.0.attention.w{letter}.weight" for letter in "qkvo"),
    }


LORA = {"kind": "lora", "rank": 3, "alpha": 6.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_moves_the_matrices_inside_blocks(family: str, results: Path) -> None:
    trainer = trainer_of(results, child_of(family, LORA))
    matrices = {name for name in trainer.scope.tensors()["model"] if ".w" in name and "layers." in name}
    matrices -= {name for name in matrices if "norm" in name or "router" in name or name.endswith("_norm.weight")}
    changed = moved(trainer)
    assert {name for name in changed if ".attention." in name or ".experts.w" in name} == {
        name for name in matrices if ".attention." in name or ".experts.w" in name
    }
    assert not changed & {"embedding.weight", "norm.weight", "tables.0.weight", "output.weight"}


def test_lora_equals_two_products_and_starts_at_the_parents_function(results: Path) -> None:
    trainer = trainer_of(results, child_of("dense", LORA | {"modules": ["attention.wq", "w2"]}))
    parent = trainer_of(results, child_of("dense", {"kind": "all"}))
    tokens = trainer.loader.batch(0).tokens_BT
    assert torch.equal(trainer.model(tokens), parent.model(tokens))
    assert moved(trainer) == {
        name for name in state_of(parent) if name.endswith(("attention.wq.weight", "feed_forward.w2.weight"))
    }
    linear = trainer.model.layers[0].attention.wq
    addition = linear.parametrizations.weight[0]
    assert (addition.A.shape, addition.B.shape) == ((3, 32), (32, 3))
    x = torch.randn(5, 32)
    original = linear.parametrizations.weight.original
    torch.testing.assert_close(linear(x), x @ original.T + 2.0 * (x @ addition.A.T) @ addition.B.T)
    assert addition.A.abs().max() <= 32**-0.5 + 0.1  # Kaiming-uniform with a = sqrt(5), and three steps


@pytest.mark.parametrize(
    ("family", "trainable", "options"),
    [
        ("memory_plus", ROWS, SGD),
        ("peer", {**ROWS, "score": "random"}, ADAMW),
        ("moe_topk", ROWS, ADAMW),
        ("moe_topk", LORA, {}),
        ("dense", {"kind": "parameters", "patterns": ["norm.weight"]}, {}),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    family: str, trainable: dict[str, Any], options: dict[str, Any], results: Path
) -> None:
    cell = child_of(family, trainable, checkpoint_every=3, **options)
    corpus = corpus_of(cell, results / "cache")
    whole = prepare(results, cell)
    killed = RunDir(results / "runs" / f"killed-{family}-{trainable['kind']}")
    killed.write_cell(cell)
    assert train(cell, corpus, whole) == "done"
    dying = Trainer(cell, corpus, killed)
    for _ in range(5):
        dying.train_step()
        if dying.step == 3:
            dying.save()
    assert train(cell, corpus, killed) == "done"
    expected = load_model(whole, cell, corpus).state_dict()
    for name, tensor in load_model(killed, cell, corpus).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("family", "trainable", "options", "words"),
    [
        ("dense", {"kind": "row"}, {}, "train.trainable.kind: got row"),
        ("dense", {"kind": "rows", "score": "tf"}, SGD, "train.trainable.top: got None"),
        ("dense", {"kind": "rows", "score": "reads", "top": 3}, SGD, "train.trainable.top: got 3"),
        ("memory_plus", ROWS, {}, "train.value_lazy: got False"),
        ("memory_plus", ROWS, {"table_optimizer": "dense"}, "train.table_optimizer: got 'dense'"),
        ("dense", LORA, {"matrix_optimizer": "muon"}, "train.matrix_optimizer: got 'muon'"),
        ("dense", {"kind": "tables"}, {"init_from": None, "parent": None}, "train.trainable.kind: got 'tables'"),
        ("dense", {"kind": "parameters", "patterns": ["("]}, {}, "train.trainable.patterns: got"),
    ],
)
def test_a_mistake_in_the_cell_names_field_and_value(
    family: str, trainable: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        child_of(family, trainable, **options)
    assert words.removeprefix("train.trainable.") in str(caught.value)


@pytest.mark.parametrize(
    ("family", "trainable", "options", "words"),
    [
        ("dense", ROWS, SGD, "train.trainable.kind: got 'rows'"),
        ("dense", {"kind": "tables"}, {}, "train.trainable.kind: got 'tables'"),
        ("dense", LORA | {"modules": ["wz"]}, {}, "train.trainable.modules: got 'wz'"),
        ("dense", {"kind": "parameters", "patterns": ["norm"]}, {}, "train.trainable.patterns: got 'norm'"),
    ],
)
def test_what_a_model_lacks_is_one_line(
    family: str, trainable: dict[str, Any], options: dict[str, Any], words: str, results: Path
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        trainer_of(results, child_of(family, trainable, **options))
    assert "\n" not in str(caught.value)


def test_the_default_leaves_hashes_unchanged() -> None:
    assert tiny_cell(trainable={"kind": "all"}).hash8 == tiny_cell().hash8
    assert child_of("dense", LORA).hash8 != child_of("dense", {"kind": "all"}).hash8


def test_lora_has_a_product_for_each_expert(results: Path) -> None:
    trainer = trainer_of(results, child_of("moe_topk", {"kind": "all"}))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    names = lora.add(trainer.model, TrainLoRA(kind="lora", rank=2, modules=("experts.w1",)), seed=0)
    assert names == [f"layers.{layer}.feed_forward.experts.w1" for layer in range(4)]
    module = trainer.model.layers[0].feed_forward.experts
    addition = module.parametrizations.w1[0]
    with torch.no_grad():
        addition.B.normal_()
    expected = torch.stack([w + b @ a for w, b, a in zip(before[names[0]], addition.B, addition.A, strict=True)])
    torch.testing.assert_close(module.w1, expected)


TABLES = ("memory_plus keep_ffn", "peer", "ultramem_v2", "engram", "ngram_embedding", "token_table stem", "moe_topk")


@pytest.mark.parametrize("case", TABLES)
def test_one_rule_chooses_the_rows_of_every_family(case: str) -> None:
    """Value rows, pairs of rows, n-grams' rows, tokens' rows and experts: no other row of a table moves."""
    model = small_model(case)
    options = {**SGD, "init_from": "a", "parent": "0" * 8, "trainable": {**ROWS, "score": "tf"}}
    config = TrainConfig.model_validate(
        {"batch_rows": 2, "epochs": 1, "lr": 1e-3, "value_weight_decay": 0.0, **options}
    )
    choice = RowChoice(model, TrainRows(kind="rows", top=2, score="tf"), seed=0)
    optimizer = Optimizer(model, config, choice)
    before = {name: optimizer.tables[name].weight.clone() for name in optimizer.tables}
    assert before
    choice.begin(0)
    choice.counts.start(tokens(2, 20))
    model(tokens(2, 20)).square().mean().backward()
    choice.counts.stop()
    optimizer.set_lr(1.0, 0.0)
    optimizer.step()
    for name, rows in before.items():
        moved_rows = (optimizer.tables[name].weight != rows).any(1).nonzero().squeeze(1).tolist()
        chosen = choice.is_chosen(name.rpartition(".")[0]).nonzero().squeeze(1).tolist()
        assert len(chosen) == 2
        assert moved_rows == chosen
