"""Streams of new facts: what is in a row, in which order, and one line for every mistake."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from suite import models
from suite.cells import Cell
from suite.data.bios.new_people import NewPeople
from suite.data.bios.world import World
from suite.data.corpus import prepare
from suite.data.packing import IGNORED
from suite.errors import UserError

FACT = {"answer": " blue.", "paraphrases": ["The sky is", "Its colour is"], "questions": ["Q: What colour?\nA:"]}


def cell(data: dict[str, Any], **train: Any) -> Cell:
    settings = {"batch_rows": 4, "epochs": 1, "lr": 1e-3, **train}
    return Cell.model_validate({"model": {"family": "dense", "base": "w32"}, "data": data, "train": settings})


PEOPLE = {"kind": "new_people", "people": 30, "facts": 20, "world": 3}


def jsonl(folder: Path, *records: Any) -> dict[str, Any]:
    path = folder / "facts.jsonl"
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return {"kind": "facts", "path": str(path), "paraphrases": 2, "tokenizer": {"kind": "bytes"}}


def test_new_people_are_not_in_the_world_and_have_its_vocabulary(tmp_path: Path) -> None:
    world, new = World(30, 3), NewPeople(30, 3, 20)
    assert new.people == 4
    assert not {new.name(person) for person in range(4)} & {world.name(person) for person in range(30)}
    data = cell(PEOPLE).data
    corpus = prepare(data, tmp_path)
    known = prepare(cell({"kind": "bios", "people": 30, "world": 3}).data, tmp_path)
    assert corpus.tokenizer.fingerprint == known.tokenizer.fingerprint
    for fact in data.new_facts():
        for prompts in fact.prompts.values():
            for prompt in prompts:
                corpus.tokenizer.encode(prompt + fact.answer)
    assert math.log2(len(world.attributes[0].values)) in {fact.entropy_bits for fact in data.new_facts()}


@pytest.mark.parametrize("kind", ["new_people", "facts"])
def test_a_row_is_one_paraphrase_in_order_and_padding_enters_no_context(kind: str, tmp_path: Path) -> None:
    other = {**FACT, "answer": " green.", "paraphrases": ["Grass is", "Leaves are"]}
    data = PEOPLE if kind == "new_people" else jsonl(tmp_path, FACT, other) | {"seq_len": 32}
    made = cell(data)
    corpus = prepare(made.data, tmp_path / "cache")
    per_fact = made.data.rows_per_fact
    assert per_fact is not None
    texts = [text for fact in made.data.new_facts() for text in fact.statements(per_fact)]
    assert len(texts) == corpus.loader(0, 1).rows_per_epoch
    tokenizer = corpus.tokenizer
    for seed in (0, 1):  # the order does not depend on the seed
        rows = [corpus.loader(seed, 1).batch(step) for step in range(len(texts))]
        for row, text in zip(rows, texts, strict=True):
            expected = [tokenizer.eot_id, *tokenizer.encode(text)]
            tokens, targets = row.tokens_BT[0].tolist(), row.targets_BT[0].tolist()
            padding = len(tokens) - len(expected)
            assert tokens == expected + [tokenizer.eot_id] * padding
            assert targets == [*expected[1:], tokenizer.eot_id] + [IGNORED] * padding
            assert row.segments_BT[0].tolist() == [0] * len(expected) + [1] * padding
    model = models.build(made.model, corpus.vocab_size, 0).eval()
    batch = corpus.loader(0, 4).batch(0)
    changed = torch.where(batch.segments_BT == 1, 1, batch.tokens_BT)
    real = batch.targets_BT != IGNORED
    before, after = (model(tokens, batch.segments_BT)[real] for tokens in (batch.tokens_BT, changed))
    torch.testing.assert_close(before, after)


def test_the_stream_is_a_function_of_its_fields() -> None:
    streams = [NewPeople(30, 3, 20).stream() for _ in range(2)]
    assert streams[0] == streams[1]
    assert len({(fact.answer, fact.prompts["storage"]) for fact in streams[0]}) == 20
    assert streams[0] != NewPeople(30, 4, 20).stream()
    assert not np.array_equal(NewPeople(30, 3, 20).values, World(4, 3).values)


def test_facts_are_identified_by_content_and_not_by_path(tmp_path: Path) -> None:
    one, other = (tmp_path / name for name in ("a", "b"))
    hashes = []
    for folder in (one, other):
        folder.mkdir()
        made = cell(jsonl(folder, FACT))
        hashes.append(made.model_copy(update={"data": made.data.identified()}).hash8)
    assert hashes[0] == hashes[1]
    changed = cell(jsonl(other, FACT, {**FACT, "answer": " red."}))
    assert changed.model_copy(update={"data": changed.data.identified()}).hash8 != hashes[0]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "facts.jsonl:1: not JSON"),
        ("[" * 100_000, "facts.jsonl:1: not JSON"),
        ([1], "facts.jsonl:1: got list, allowed: one object per line"),
        ({"paraphrases": ["a", "b"]}, "facts.jsonl:1: answer"),
        ({**FACT, "paraphrases": ["The sky is"]}, "facts.jsonl:1: paraphrases: got 1"),
        ({**FACT, "questions": "Q"}, "facts.jsonl:1: questions: got 'Q'"),
        ({**FACT, "question": []}, "facts.jsonl:1: question: unknown field"),
    ],
)
def test_a_mistake_in_a_file_names_line_and_field(record: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        prepare(cell(jsonl(tmp_path, record)).data, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "train", "words"),
    [
        (PEOPLE, {"batch_rows": 6}, "train.batch_rows: got 6"),
        (PEOPLE | {"facts": 2000}, {}, "data.facts: got 2000"),
        (PEOPLE | {"paraphrases": 5}, {}, "paraphrases"),
        ({"kind": "bios", "people": 30}, {"probe_every": 5}, "train.probe_every: got 5"),
        ({"kind": "facts", "path": "x", "paraphrases": 1, "tokenizer": {"kind": "bpe"}}, {}, "data.tokenizer.kind"),
    ],
)
def test_a_mistake_in_a_cell_names_field_and_value(data: dict[str, Any], train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        cell(data, **train)


def test_a_missing_file_and_a_short_row_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.path: got .*absent"):
        cell(jsonl(tmp_path, FACT) | {"path": str(tmp_path / "absent")}).data.identified()
    with pytest.raises(UserError, match=r"data.seq_len: got 8, allowed: at least"):
        prepare(cell(PEOPLE | {"seq_len": 8}).data, tmp_path / "cache")


def test_a_line_separator_inside_a_text_does_not_end_a_fact(tmp_path: Path) -> None:
    data = jsonl(tmp_path, FACT)
    text = json.dumps({**FACT, "answer": " blue\u2028green."}, ensure_ascii=False)
    Path(data["path"]).write_text(text + "\n", encoding="utf-8")
    (fact,) = cell(data).data.new_facts()
    assert fact.answer == " blue\u2028green."
