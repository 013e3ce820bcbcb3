"""The cache: complete or absent, keyed by content, safe with several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_disk import small_disk

from suite.data import shards
from suite.data.corpus import Corpus, prepare
from suite.data.reader import is_held_out
from suite.data.sources.bios import BiosData
from suite.data.sources.text_files import TextData, fingerprint
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import DiskFull, UserError

BYTES = TokenizerConfig(kind="bytes")
BPE = TokenizerConfig(kind="bpe", vocab_size=400)
WORLD = BiosData(kind="bios", people=40, questions=0.5)
DOCUMENTS = [f"Document {i} says {i * i} — and nothing else." for i in range(300)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "text.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return path


def tokens_of(corpus: Corpus) -> list[list[int]]:
    return [r.tokens.tolist() for r in corpus.parts[0].rounds]


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(kind="word"), BYTES, BPE])
def test_a_world_is_tokenized_document_by_document(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    corpus = prepare(WORLD.model_copy(update={"tokenizer": tokenizer, "seq_len": 128}), tmp_path)
    assert corpus.world is not None
    assert corpus.held_out == []
    for index, r in enumerate(corpus.parts[0].rounds):
        assert set(r.tokens[r.starts[:-1]]) == {corpus.tokenizer.eot_id}
        spans = zip(r.starts[:-1], r.starts[1:], strict=True)
        decoded = [corpus.tokenizer.decode(r.tokens[a + 1 : b].tolist()) for a, b in spans]
        assert decoded == list(corpus.world.documents(index))
    assert corpus.vocab_size == corpus.tokenizer.vocab_size > max(map(max, tokens_of(corpus)))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_text_is_trained_on_or_held_out_never_both(tokenizer: TokenizerConfig, text: Path, tmp_path: Path) -> None:
    config = TextData(kind="text", path=str(text), tokenizer=tokenizer, held_out=0.2)
    corpus = prepare(config, tmp_path / "cache")
    r = corpus.parts[0].rounds[0]
    spans = zip(r.starts[:-1], r.starts[1:], strict=True)
    trained = [corpus.tokenizer.decode(r.tokens[a:b].tolist()) for a, b in spans]
    assert trained == [d for d in DOCUMENTS if not is_held_out(d, 0.2)]
    assert corpus.held_out == [d for d in DOCUMENTS if is_held_out(d, 0.2)]


def test_the_cache_is_keyed_by_content_and_shared_by_row_lengths(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = TextData(kind="text", path=str(text), tokenizer=BYTES, seq_len=16)
    first = prepare(config, cache)
    moved = text.rename(tmp_path / "moved.jsonl")
    again = prepare(config.model_copy(update={"path": str(moved), "seq_len": 32}), cache)
    assert again.fingerprint == first.fingerprint
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.fingerprint]
    assert again.loader(0, 2).batch(0).tokens_BT.shape == (2, 32)
    others = [{"held_out": 0.3}, {"tokenizer": BPE}]
    prints = {prepare(config.model_copy(update={"path": str(moved), **o}), cache).fingerprint for o in others}
    assert len(prints | {first.fingerprint}) == 3
    with open(moved, "a") as file:
        file.write('{"text": "more"}\n')
    changed = prepare(config.model_copy(update={"path": str(moved)}), cache)
    assert changed.fingerprint != first.fingerprint


def test_a_stated_fingerprint_is_checked_and_opens_a_prepared_corpus_without_its_files(
    text: Path, tmp_path: Path
) -> None:
    config = TextData(kind="text", path=str(text), tokenizer=BYTES, fingerprint=fingerprint(text))
    first = prepare(config, tmp_path / "cache")
    text.unlink()
    assert prepare(config, tmp_path / "cache").fingerprint == first.fingerprint
    text.write_text('{"text": "something else"}\n')
    with pytest.raises(UserError, match=r"data\.path: got .* with the content "):
        prepare(config, tmp_path / "other")


def test_every_field_of_a_world_changes_the_fingerprint(tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [{}, {"world": 1}, {"people": 41}, {"questions": 0.4}, {"zipf": 1.0}]
    assert len({prepare(WORLD.model_copy(update=c), tmp_path).fingerprint for c in changes}) == len(changes)


def test_errors_in_preparation_are_one_line_and_leave_no_files(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    config = TextData(kind="text", path=str(text), tokenizer=BYTES)
    with pytest.raises(UserError, match=r"data\.seq_len: got 8, allowed: at least 16"):
        prepare(WORLD.model_copy(update={"seq_len": 8}), tmp_path)
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(UserError, match=r"data\.held_out: got .*, which leaves"):
            prepare(config.model_copy(update={"held_out": share}), cache)
    with pytest.raises(UserError, match="'body': not among the fields, which are text"):
        prepare(config.model_copy(update={"field": "body"}), cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def _prepare_many(cache: Path, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    for world in range(4):
        prepare(WORLD.model_copy(update={"world": world}), cache)


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_and_leaves_no_files(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one fish two fish\n\nred fish blue fish\n" * 20)
    config = TextData(kind="text", path=str(path), tokenizer=TokenizerConfig(kind="bpe", vocab_size=5000))
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size: got 5000, allowed: at most 2\d\d, all that"):
        prepare(config, tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_processes_that_prepare_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(4)
    workers = [context.Process(target=_prepare_many, args=(tmp_path / "cache", gate)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    for world in range(4):
        config = WORLD.model_copy(update={"world": world})
        together, alone = prepare(config, tmp_path / "cache"), prepare(config, tmp_path / "alone")
        assert tokens_of(together) == tokens_of(alone)
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 4


def _write_and_hang(folder: Path) -> None:
    (folder / "round-0.tokens").write_bytes(b"half")
    (folder / "written").touch()
    time.sleep(60)


def test_a_killed_writer_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    finished = prepare(WORLD, tmp_path / "other")
    folder = tmp_path / "cache" / finished.fingerprint
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=shards.build_once, args=(folder, _write_and_hang))
    writer.start()
    partial = folder.with_name(f"{folder.name}.partial")
    while not (partial / "written").exists():
        time.sleep(0.01)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert partial.exists()
    assert not folder.exists()
    assert tokens_of(prepare(WORLD, tmp_path / "cache")) == tokens_of(finished)
    assert not partial.exists()


def test_a_corpus_for_which_there_is_no_space_is_named_and_prepared_once_there_is(text: Path, tmp_path: Path) -> None:
    config, cache = TextData(kind="text", path=str(text), tokenizer=BYTES), tmp_path / "cache"
    with small_disk(10_000), pytest.raises(DiskFull, match=rf"{cache}/\w+: cannot be written: "):
        prepare(config, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert tokens_of(prepare(config, cache)) == tokens_of(prepare(config, tmp_path / "other"))


def test_large_vocabularies_use_wider_tokens(tmp_path: Path) -> None:
    class Wide:
        vocab_size, eot_id = 70_001, 70_000

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[int(text)] for text in texts]

    assert shards.write_round(tmp_path, 0, map(str, range(66_000, 69_000)), Wide()) == 3000  # type: ignore[arg-type]
    read = shards.read_round(tmp_path, 0, 70_001)
    assert read.tokens.dtype == np.uint32
    assert read.tokens.reshape(-1, 2).tolist() == [[70_000, n] for n in range(66_000, 69_000)]


def test_importing_the_package_loads_few_libraries(tmp_path: Path) -> None:
    probe = (
        "import sys; import suite.data;"
        "print(sorted({'pandas', 'lm_eval', 'datasets', 'submitit', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_with_a_validation_file_all_of_path_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"train {i}"}) + "\n" for i in range(200)))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": f"valid {i}"}) + "\n" for i in range(7)))
    config = TextData(
        kind="text", path=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "valid.jsonl"), tokenizer=BYTES
    )
    corpus = prepare(config, tmp_path / "cache")
    assert corpus.held_out == [f"valid {i}" for i in range(7)]
    assert corpus.parts[0].meta["documents"] == 200
    (tmp_path / "valid.jsonl").write_text('{"text": "another"}\n')
    other = prepare(config, tmp_path / "cache")
    assert other.fingerprint != corpus.fingerprint
    assert other.held_out == ["another"]
    missing = config.model_copy(update={"validation": str(tmp_path / "none.jsonl")})
    with pytest.raises(UserError, match=r"data\.validation: got .*none\.jsonl"):
        prepare(missing, tmp_path / "cache")
    assert [field for field, *_ in config.model_copy(update={"held_out": 0.2}).problems()] == ["held_out"]


def test_records_without_text_are_counted_when_the_writer_is_resumed(tmp_path: Path) -> None:
    texts = [f"document {i}" if i % 3 else None for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TextData(kind="text", path=str(tmp_path / "a.jsonl"), tokenizer=BYTES)
    assert prepare(config, tmp_path / "cache").parts[0].meta["skipped"] == 100


def test_text_is_read_and_written_as_utf8_in_any_locale(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"né {i} — 漢字"}, ensure_ascii=False) + "\n" for i in range(99)), encoding="utf-8"
    )
    program = (
        "import sys; from pathlib import Path; from suite.data.corpus import prepare;"
        "from suite.data.sources.text_files import TextData;"
        "config = TextData(kind='text', path=sys.argv[1], tokenizer={'kind': 'bpe', 'vocab_size': 300});"
        "corpus = prepare(config, Path(sys.argv[2]));"
        "assert chr(0x6f22) in corpus.tokenizer.decode(corpus.parts[0].rounds[0].tokens.tolist())"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [
        sys.executable,
        "-c",
        ascii(program)[1:-1].replace("\\'", "'"),
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "cache"),
    ]
    subprocess.run(command, env=environment, check=True)
