"""Learning and forgetting of a model that is taught new facts: what is recorded, and that it is right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cells import corpus_of, tiny_cell
from torch.nn import functional as F

from suite.cells import Cell
from suite.data.corpus import prepare as prepare_corpus
from suite.launch import worker
from suite.launch.preparation import prepare
from suite.records import RunDir
from suite.train.checkpoint import load_model
from suite.train.finetuning.knowledge import KnowledgeProber
from suite.train.loop import Trainer, train

NEW = {"kind": "new_people", "people": 30, "facts": 12, "questions": 0.5}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert worker.run_cell(prepare(folder, tiny_cell("memory_plus", epochs=4.0)).path) == "done"
    return folder


def child(**train: Any) -> Cell:
    parent = tiny_cell("memory_plus", epochs=4.0)
    fields = parent.train.model_dump() | {"init_from": "parent", "parent": parent.hash8, "warmup": 0, "epochs": 1.0}
    trained = fields | {"schedule": "constant", "probe_every": 5, **train}
    return Cell.model_validate(parent.model_dump() | {"data": NEW, "train": trained})


@pytest.fixture(scope="module")
def taught(results: Path) -> RunDir:
    run = prepare(results, child())
    assert worker.run_cell(run.path) == "done", run.state()
    return run


def measurements(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in run.train_lines() if "new" in line]


def test_measurements_are_before_the_first_fact_every_n_facts_and_after_the_last(taught: RunDir) -> None:
    lines = measurements(taught)
    assert [line["step"] for line in lines] == [0, 5, 10, 12]
    assert [line["new"]["taught"] for line in lines] == [0, 5, 10, 12]
    for line in lines:
        for kind in ("storage", "paraphrase", "extraction"):
            assert len(line["new"][kind]["bits"]) == len(line["new"][kind]["recall"]) == 12
        assert {"storage", "paraphrase", "extraction"} == set(line["known"]["probe"])
        touched = line["rows_touched"]["tables.0.weight"]
        assert touched["rows"] == 256
        assert (touched["touched"] > 0) == (line["step"] > 0)


def test_taught_facts_gain_bits(taught: RunDir) -> None:
    first, *_, last = (line["new"]["storage"]["bits"] for line in measurements(taught))
    assert sum(last) > sum(first) + 5


def test_bits_equal_a_plain_forward_pass(taught: RunDir, results: Path) -> None:
    cell = taught.read_cell()
    corpus = corpus_of(cell, results / "cache")
    model = load_model(taught, cell, corpus).double()
    recorded = measurements(taught)[-1]["new"]
    for number in (0, 11):
        fact = cell.data.new_facts()[number]
        for kind, prompts in fact.prompts.items():
            total = 0.0
            for prompt in prompts:
                head = [corpus.tokenizer.eot_id, *corpus.tokenizer.encode(prompt)]
                tail = corpus.tokenizer.encode(fact.answer)
                log_p = F.log_softmax(model(torch.tensor([head + tail]))[0].double(), -1)
                total += sum(log_p[len(head) - 1 + at, token].item() for at, token in enumerate(tail))
            expected = fact.entropy_bits + total / len(prompts) / math.log(2)
            assert recorded[kind]["bits"][number] == pytest.approx(expected, abs=2e-3)


def test_what_the_parent_knew_is_scored_as_the_parent_was(taught: RunDir, results: Path) -> None:
    """The first measurement equals a probe of the parent itself."""
    cell = tiny_cell("memory_plus", epochs=4.0, probes=1)
    corpus = corpus_of(cell, results / "cache")
    parent = RunDir(results / "runs" / tiny_cell("memory_plus", epochs=4.0).run_name)
    trainer = Trainer(cell, corpus, RunDir(results / "runs" / "probe"))
    scores = trainer.prober.run(load_model(parent, parent.read_cell(), corpus))
    known = measurements(taught)[0]["known"]
    assert known["probe"] == scores["probe"]
    assert known["loss"] == scores["eval_loss"]


def test_a_killed_run_has_the_measurements_of_an_undisturbed_one(taught: RunDir, results: Path) -> None:
    cell = child(checkpoint_every=3)
    corpus = corpus_of(cell, results / "cache")
    killed = RunDir(results / "runs" / "killed")
    killed.write_cell(cell)
    steps = iter([False] * 7 + [True])
    assert train(cell, corpus, killed, should_stop=lambda: next(steps)) == "interrupted"
    assert train(cell, corpus, killed) == "done"
    times = {"wall_s"}
    without_times = [
        [{key: value for key, value in line.items() if key not in times} for line in measurements(run)]
        for run in (taught, killed)
    ]
    assert without_times[0] == without_times[1]


def test_text_parents_are_measured_in_bits_per_byte(text: Any, text_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"answer": " blue.", "paraphrases": ["The sky is"]}\n')
    data = {"kind": "facts", "path": str(path), "paraphrases": 1, "tokenizer": {"kind": "bytes"}}
    cell = Cell.model_validate(
        {"model": {"family": "dense", "base": "w32"}, "data": data, "train": {"batch_rows": 1, "lr": 1.0, "epochs": 1}}
    )
    corpus = prepare_corpus(cell.data, tmp_path / "cache")
    line = KnowledgeProber(corpus, text, 1).run(text_model, 0)
    held_out = "".join(text.held_out).encode()
    known = line["known"]
    targets = len(held_out) + len(text.held_out) - 1  # bytes and the ends of documents, except the last
    assert known["bits_per_byte"] == pytest.approx(known["loss"] / math.log(2) * targets / len(held_out), rel=0.02)
    assert line["new"]["storage"]["bits"][0] < 0
    assert "paraphrase" not in line["new"]
