"""Streams written in pieces: a kill loses one piece, memory is bounded, and the bytes are always the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suite.data import resumable_writer, shards
from suite.data.corpus import prepare
from suite.data.reader import is_held_out
from suite.data.sources.text_files import TextData
from suite.data.tokenizer_config import TokenizerConfig
from suite.data.tokenizers import BytesTokenizer
from suite.errors import UserError

HELD = 0.1


class Counter:
    """A reader of the documents "0", "1" ... that records how it was created and read."""

    def __init__(self, count: int, position: Any = None, text: str = "document {}") -> None:
        self._count, self._template = count, text
        self.position = position or 0
        self.share = None
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        for number in range(self.position, self._count):
            self.position = number + 1
            yield self._template.format(number)


class Deadly(BytesTokenizer):
    """Kills its process like `kill -9` instead of encoding batch `last`."""

    def __init__(self, last: int) -> None:
        self._left = last

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_batch(texts)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_writer, "PIECE_TOKENS", 600)
    monkeypatch.setattr(resumable_writer, "BATCH_DOCUMENTS", 10)


def write(folder: Path, tokenizer: BytesTokenizer, count: int = 300, **options: Any) -> resumable_writer.Written:
    return resumable_writer.write_stream(folder, lambda at: Counter(count, at), tokenizer, HELD, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kills", [[1], [7], [2, 3, 1, 9], [29]])
def test_a_killed_writer_resumes_and_writes_the_bytes_of_an_uninterrupted_one(kills: list[int], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    written = write(whole, BytesTokenizer())
    assert written.pieces > 5
    for last in kills:
        process = multiprocessing.get_context("fork").Process(target=write, args=(killed, Deadly(last)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert write(killed, BytesTokenizer()) == written
    assert content(killed) == content(whole)


@pytest.mark.usefixtures("small_pieces")
def test_a_restart_reads_only_from_the_committed_position(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, Deadly(20)))
    process.start()
    process.join()
    committed = json.loads((tmp_path / shards.META).read_text())
    assert 100 < committed["position"] < 200
    positions = []
    resumable_writer.write_stream(tmp_path, lambda at: positions.append(at) or Counter(300, at), BytesTokenizer(), HELD)
    assert positions == [committed["position"]]


@pytest.mark.usefixtures("small_pieces")
def test_documents_are_written_and_their_tokens_fingerprinted(tmp_path: Path) -> None:
    written = write(tmp_path, BytesTokenizer())
    texts = [f"document {number}" for number in range(300)]
    trained = [text for text in texts if not is_held_out(text, HELD)]
    r = shards.read_round(tmp_path, 0, 257)
    spans = itertools.pairwise(r.starts.tolist())
    assert [BytesTokenizer().decode(r.tokens[a:b].tolist()) for a, b in spans] == trained
    held = [json.loads(line)["text"] for line in (tmp_path / resumable_writer.HELD_OUT).read_text().splitlines()]
    assert held == [text for text in texts if is_held_out(text, HELD)]
    assert (written.documents, written.held_out) == (len(trained), len(held))
    assert written.tokens == sum(len(text) + 1 for text in trained) == len(r.tokens)
    # The chain of fingerprints, from the piece's definition: whole batches of ten, closed at 600 tokens or more.
    chain, piece = "", b""
    for start in range(0, 300, 10):
        for text in texts[start : start + 10]:
            if not is_held_out(text, HELD):
                piece += np.array([256, *text.encode()], dtype=np.uint16).tobytes()
        if len(piece) >= 2 * 600 or start == 290:
            chain, piece = hashlib.sha256(chain.encode() + piece).hexdigest(), b""
    assert written.content == chain


@pytest.mark.usefixtures("small_pieces")
def test_a_limit_ends_the_stream_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    unlimited, limited = tmp_path / "a", tmp_path / "b"
    unlimited.mkdir()
    limited.mkdir()
    write(unlimited, BytesTokenizer())
    shares: list[float | None] = []
    written = write(limited, BytesTokenizer(), max_tokens=1000, progress=lambda tokens, share: shares.append(share))
    assert 1000 <= written.tokens < 1000 + len("document 99") + 1
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    tokens = (limited / "round-0.tokens").read_bytes()
    assert (unlimited / "round-0.tokens").read_bytes().startswith(tokens)


def test_held_out_documents_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_writer, "MAX_HELD_OUT", 5)
    written = write(tmp_path, BytesTokenizer())
    trained = sum(not is_held_out(f"document {number}", HELD) for number in range(300))
    assert (written.held_out, written.documents) == (5, trained)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_writer, "PIECE_TOKENS", 1 << 18)
    monkeypatch.setattr(resumable_writer, "BATCH_CHARACTERS", 1 << 16)
    peaks = []
    text = "{:09}" + "x" * 4000
    for count in (100, 3000):  # 0.4 and 12 MB
        folder = tmp_path / str(count)
        folder.mkdir()
        tracemalloc.start()
        resumable_writer.write_stream(folder, lambda at, n=count: Counter(n, at, text), BytesTokenizer(), HELD)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_interrupted_preparation_resumes(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        texts = [f"file {number} document {i}" for i in range(60)]
        if suffix == ".jsonl":
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        else:
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.table({"text": texts}), folder / f"{number}.parquet")
    config = TextData(kind="text", path=str(folder), tokenizer=TokenizerConfig(kind="bytes"), held_out=HELD)
    expected = prepare(config, tmp_path / "whole")
    real = shards.RoundFile.append
    calls = itertools.count()

    def fails(self: shards.RoundFile, encoded: list[list[int]]) -> bytes:
        if next(calls) == 11:
            raise OSError("No space left on device")
        return real(self, encoded)

    monkeypatch.setattr(shards.RoundFile, "append", fails)
    with pytest.raises(OSError, match="No space"):
        prepare(config, tmp_path / "interrupted")
    assert [path.suffix for path in (tmp_path / "interrupted").iterdir() if path.is_dir()] == [".partial"]
    resumed = prepare(config, tmp_path / "interrupted")
    assert content(resumed.parts[0].folder) == content(expected.parts[0].folder)
    assert resumed.held_out == expected.held_out


def test_a_stream_without_training_or_held_out_text_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.held_out: got 0\.1, which leaves 1 documents to train on and 0 to"):
        write(tmp_path, BytesTokenizer(), count=1)
    assert not (tmp_path / shards.META).exists()
