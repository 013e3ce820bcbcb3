"""The registry of data kinds: a source is one class, and existing cells do not change their hashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import suite.models  # noqa: F401  (registers the families)
from suite.cells import Cell
from suite.data.corpus import prepare
from suite.data.sources import registry
from suite.data.sources.registry import kinds, register
from suite.data.sources.streams import StreamData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.grids import load_cell, load_grid
from suite.records import RunDir
from suite.train.loop import train

BYTES = {"kind": "bytes"}
FILE = {"kind": "file", "path": "/x/tokenizer.json", "fingerprint": "e" * 64}
BOOKS = {"kind": "text", "path": "/b", "fingerprint": "d" * 64}
HUB = {"kind": "hub", "name": "some/set"}


class CountingReader:
    """The documents `0`, `0 1`, `0 1 2`, ..."""

    share = None
    skipped = 0

    def __init__(self, documents: int, position: int | None) -> None:
        self._documents, self.position = documents, position or 0

    def __iter__(self) -> Iterator[str]:
        while self.position < self._documents:
            self.position += 1
            yield " ".join(map(str, range(self.position)))


class CountingData(StreamData):
    kind: Literal["counting"]
    documents: int
    held_out: float = 0.1
    seq_len: int = 16
    tokenizer: TokenizerConfig = TokenizerConfig(kind="bytes")

    @property
    def label(self) -> str:
        return f"{self.documents} counts"

    def reader(self, position: Any = None) -> CountingReader:
        return CountingReader(self.documents, position)


@pytest.fixture(scope="module", autouse=True)
def _counting() -> Iterator[None]:
    """Register the kind for this module only: other tests list the kinds of the package."""
    register(CountingData)
    yield
    del registry._KINDS["counting"]


def cell(data: dict[str, Any]) -> Cell:
    model, training = {"family": "dense", "base": "w32"}, {"batch_rows": 4, "tokens": 1000, "lr": 1e-3}
    return Cell.model_validate({"model": model, "data": data, "train": training})


def test_a_source_defined_in_one_class_is_trained_on(tmp_path: Path) -> None:
    counting = cell({"kind": "counting", "documents": 40})
    corpus = prepare(counting.data, tmp_path / "cache")
    documents = {" ".join(map(str, range(count))) for count in range(1, 41)}
    trained = corpus.tokenizer.decode(corpus.parts[0].rounds[0].tokens.tolist())
    assert len(trained) + sum(map(len, corpus.held_out)) == sum(map(len, documents))
    assert 0 < len(corpus.held_out) < 40
    assert train(counting, corpus, RunDir(tmp_path / "run")) == "done"
    assert Cell.model_validate_json(counting.model_dump_json()) == counting


def test_a_new_stream_can_be_a_part_of_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join("word " * 500 for _ in range(40)))
    parts = {
        "numbers": {"kind": "counting", "documents": 40, "weight": 1.0},
        "words": {"kind": "text", "path": str(tmp_path / "a.txt"), "weight": 3.0, "held_out": 0.5},
    }
    mixture = cell({"kind": "mixture", "parts": parts, "tokenizer": BYTES, "seq_len": 16}).data
    with pytest.raises(UserError, match="held_out"):  # forty equal documents are all trained on or all held out
        prepare(mixture, tmp_path / "cache")
    lines = [f"{n} " + "word " * 450 for n in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    corpus = prepare(mixture, tmp_path / "cache")
    assert [part.meta["documents"] > 0 for part in corpus.parts] == [True, True]


def test_a_kind_can_be_registered_once() -> None:
    with pytest.raises(ValueError, match="'counting'"):
        register(CountingData)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"kind": "nosuch"}, "data.kind: got 'nosuch', allowed: bios, text, hub, mixture"),
        ({"kind": "countin"}, "data.kind: got 'countin', did you mean counting?"),
        ({"people": 3}, "data.kind: got nothing"),
        ({"kind": "counting"}, "data.documents: got nothing"),
        ({"kind": "counting", "documents": 3, "document": 3}, "data.document: unknown field"),
        ({"kind": "mixture", "tokenizer": BYTES, "parts": {"a": {"kind": "bios"}}}, "data.parts.a.kind: got 'bios'"),
        (
            {"kind": "mixture", "tokenizer": BYTES, "parts": {"a": {**HUB, "weight": 1.0, "seq_len": 8}}},
            "data.parts.a.seq_len: unknown field",
        ),
        (
            {**BOOKS, "tokenizer": {"path": "x"}},
            "data.tokenizer.kind: got nothing, allowed: word, bpe, bytes, file",
        ),
        ({**BOOKS, "tokenizer": "x"}, "data.tokenizer: got 'x', allowed: a mapping of fields to values"),
        ({**BOOKS, "tokenizer": {"kind": "word"}}, "data.tokenizer.kind: got 'word'"),
        ({"kind": "bios", "people": 4_000_000}, "data.people: got 4000000, allowed: at most 3001250"),
    ],
)
def test_errors_in_data_kinds_name_the_users_field(data: dict[str, Any], field: str, tmp_path: Path) -> None:
    fields = cell({"kind": "counting", "documents": 40}).model_dump(mode="json") | {"data": data}
    (tmp_path / "cell.json").write_text(json.dumps(fields))
    with pytest.raises(UserError) as raised:
        load_cell(tmp_path / "cell.json")
    assert field in str(raised.value)
    assert "instance of" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "run"),
    [
        ({"kind": "bios", "people": 50}, "dense-w32-s0-61fb970d"),
        (
            {
                "kind": "bios",
                "people": 50,
                "world": 3,
                "questions": 0.5,
                "zipf": 1.0,
                "seq_len": 64,
                "tokenizer": {"kind": "bpe", "vocab_size": 400},
            },
            "dense-w32-s0-910cf0d7",
        ),
        ({"kind": "text", "path": "/a", "fingerprint": "f" * 64}, "dense-w32-s0-df0f307a"),
        ({"kind": "text", "path": "/a"}, "dense-w32-s0-7f70a65d"),
        ({**HUB, "tokenizer": BYTES}, "dense-w32-s0-7b65fa87"),
        (
            {
                **HUB,
                "subset": "s",
                "split": "validation",
                "revision": "c",
                "field": "content",
                "tokens": 1000,
                "held_out": 0.01,
                "seq_len": 128,
                "tokenizer": FILE,
            },
            "dense-w32-s0-7cedbe4a",
        ),
        (
            {
                "kind": "mixture",
                "tokenizer": FILE,
                "parts": {"web": {**HUB, "tokens": 10, "weight": 3.0}, "books": {**BOOKS, "weight": 1.0}},
            },
            "dense-w32-s0-3e5689fe",
        ),
    ],
)
def test_names_of_existing_runs_do_not_change(data: dict[str, Any], run: str) -> None:
    assert cell(data).run_name == run


@pytest.mark.parametrize(
    ("grid", "runs"),
    [
        (
            "smoke",
            [
                "dense-w32-s0-090cc3a0",
                "moe-w32-s0-c20b5ad5",
                "memory_plus-w32-k16-s0-9160e068",
                "memory_plus-w32-k32-s0-bd1c0f87",
            ],
        ),
        ("laptop", ["dense-w32-s0-1f6ca6ea", "dense-w32-s1-55c9a549", "dense-w32-s2-8f21b657"]),
        ("factbook", ["dense-w64-s0-2eafa81c", "memory_plus-w64-k128-s0-9f91a22d"]),
    ],
)
def test_names_of_the_cells_in_shipped_grids_do_not_change(
    grid: str, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORPUS", "/nowhere")
    assert [loaded.run_name for loaded in load_grid(grid, need_data=False).cells][: len(runs)] == runs


def test_kinds_are_listed_in_the_order_of_registration() -> None:
    assert list(kinds())[:4] == ["bios", "text", "hub", "mixture"]


def test_the_parts_of_a_mixture_are_quick_to_prepare_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 500_000)  # 2.5 of 4 MB
    part = {"kind": "text", "path": str(tmp_path), "weight": 1}
    quick = [
        kinds()["mixture"].model_validate({"kind": "mixture", "tokenizer": BYTES, "parts": parts}).is_quick_to_prepare
        for parts in ({"a": part}, {"a": part, "b": part})
    ]
    assert quick == [True, False]


def test_a_source_states_which_tasks_and_dry_runs_suit_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 100)
    text = {"kind": "text", "path": str(tmp_path), "tokenizer": BYTES}
    bios = {"kind": "bios", "people": 10}
    sources: dict[str, Any] = {
        "text": text,
        "mixture": {"kind": "mixture", "tokenizer": BYTES, "parts": {"a": {**text, "weight": 1}}},
        "hub": {**HUB, "tokenizer": BYTES},
        "counts": {"kind": "counting", "documents": 40},
        "bios": bios,
        "large": {**bios, "people": 50_000},
    }
    del sources["mixture"]["parts"]["a"]["tokenizer"]
    made = {name: kinds()[data["kind"]].model_validate(data) for name, data in sources.items()}
    assert {name for name, data in made.items() if data.is_quick_to_prepare} == {"text", "bios", "mixture"}
    assert {name for name, data in made.items() if list(data.documents_on_disk())} == {"text"}
    with_text = {"text", "mixture", "hub", "counts"}
    assert {name for name, data in made.items() if data.task_problem("held_out") is None} == with_text
    assert {name for name, data in made.items() if data.task_problem("storage") is None} == {"bios", "large"}
