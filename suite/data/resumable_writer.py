"""Writes a stream of documents as one round, in pieces. An interruption loses only the last piece.

A piece ends after a whole batch of documents. META records what has been committed: the lengths of the files, the
position of the reader, and the fingerprint of the content so far. A restarted writer truncates the files to these
lengths and resumes, so that the final bytes are those of an uninterrupted writer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from suite.atomic import write_json
from suite.data.reader import Reader, is_held_out
from suite.data.shards import META, RoundFile, open_truncated
from suite.data.tokenizers import Tokenizer
from suite.errors import UserError

HELD_OUT = "held_out.jsonl"
PIECE_TOKENS = 1 << 22
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22
MAX_HELD_OUT = 10_000
"""Largest number of documents to evaluate on; further documents of the held-out share are not used at all."""


@dataclass
class Written:
    """What has been committed: counts, bytes of the held-out file, the content's sha256, and the reader's position.

    `content` is a chain: the sha256 of the previous one, in hex, and the bytes of the piece's tokens.
    """

    rounds: int = 1
    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    held_out_bytes: int = 0
    pieces: int = 0
    content: str = ""
    position: Any = None
    skipped: int = 0


class Progress(Protocol):
    """Receives the progress of a preparation."""

    def __call__(self, tokens: int, share: float | None, stage: str | None = None) -> None:
        """Report progress.

        Args:
            tokens: Tokens written so far.
            share: The fraction done, 0 to 1; None: unknown.
            stage: What is done before the first token is written, in words; None: tokens are written.
        """


def no_progress(tokens: int, share: float | None, stage: str | None = None) -> None:
    """Report nothing; the default Progress."""


def write_stream(
    folder: Path,
    reader_at: Callable[[Any], Reader],
    tokenizer: Tokenizer,
    held_out: float,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
    validation: Iterable[str] | None = None,
) -> Written:
    """Encode a stream into `folder`, resuming after the last committed piece of an interrupted call.

    Args:
        folder: Where round 0 and the held-out documents are written.
        reader_at: Creates the reader that starts at a position; None is the beginning.
        tokenizer: Encodes the documents; must be the same on every call.
        held_out: Share of documents written to HELD_OUT instead, at most MAX_HELD_OUT of them.
        max_tokens: The stream ends with the document that reaches this; None: where the reader ends.
        progress: Called after every batch.
        validation: Further documents for HELD_OUT.

    Memory: one batch of BATCH_DOCUMENTS documents or BATCH_CHARACTERS characters, plus one document.

    Returns:
        What has been written.

    Raises:
        UserError: No document is left to train on, or to evaluate on; raised before the last commit.
    """
    with _Writer(folder, tokenizer, held_out, max_tokens) as writer:
        if validation is not None:
            writer.add_validation(validation)
        reader = reader_at(writer.written.position)
        stream = iter(reader)
        while not writer.is_full and (texts := _batch(stream)):
            writer.add(texts)
            progress(writer.round.tokens, writer.share(reader))
            if writer.round.tokens - writer.written.tokens >= PIECE_TOKENS:
                writer.commit(reader)
        writer.check()
        if reader.position != writer.written.position:
            writer.commit(reader)
        return writer.written


class _Writer:
    """The files of a stream, and how much of them is committed."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, held_out: float, max_tokens: int | None) -> None:
        self._meta, self._tokenizer, self._held_out, self._max_tokens = folder / META, tokenizer, held_out, max_tokens
        self.written = (
            Written(**json.loads(self._meta.read_text(encoding="utf-8"))) if self._meta.exists() else Written()
        )
        self.round = RoundFile(folder, 0, tokenizer.vocab_size, self.written.documents, self.written.tokens)
        self._held_out_file = open_truncated(folder / HELD_OUT, self.written.held_out_bytes)
        self._retained = self.written.held_out
        self._skipped = self.written.skipped
        self._digest = hashlib.sha256(self.written.content.encode())

    @property
    def is_full(self) -> bool:
        """Whether `max_tokens` is reached."""
        return self._max_tokens is not None and self.round.tokens >= self._max_tokens

    def share(self, reader: Reader) -> float | None:
        """Return the fraction of the stream that is written."""
        return reader.share if self._max_tokens is None else min(1.0, self.round.tokens / self._max_tokens)

    def add(self, texts: list[str]) -> None:
        """Write a batch of documents to the training or the held-out file."""
        trained = []
        for text in texts:
            if not is_held_out(text, self._held_out):
                trained.append(text)
            else:
                self._hold_out(text)
        encoded = [[self._tokenizer.eot_id, *tokens] for tokens in self._tokenizer.encode_batch(trained)]
        self._digest.update(self.round.append(self._up_to_max(encoded)))

    def add_validation(self, texts: Iterable[str]) -> None:
        """Write documents to the held-out file, unless an earlier call has committed them."""
        if not self.written.pieces:
            for text in islice(texts, MAX_HELD_OUT):
                self._hold_out(text)

    def _hold_out(self, text: str) -> None:
        if self._retained < MAX_HELD_OUT:
            self._retained += 1
            self._held_out_file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())

    def _up_to_max(self, encoded: list[list[int]]) -> list[list[int]]:
        if self._max_tokens is None:
            return encoded
        tokens = self.round.tokens
        for count, document in enumerate(encoded, start=1):
            tokens += len(document)
            if tokens >= self._max_tokens:
                return encoded[:count]
        return encoded

    def commit(self, reader: Reader) -> None:
        """Flush everything added to disk, and record it together with the position of `reader`."""
        self.round.flush()
        self._held_out_file.flush()
        os.fsync(self._held_out_file.fileno())
        self.written = Written(
            documents=self.round.documents,
            tokens=self.round.tokens,
            held_out=self._retained,
            held_out_bytes=self._held_out_file.tell(),
            pieces=self.written.pieces + 1,
            content=self._digest.hexdigest(),
            position=reader.position,
            skipped=self._skipped + reader.skipped,
        )
        write_json(self._meta, asdict(self.written))
        self._digest = hashlib.sha256(self.written.content.encode())

    def check(self) -> None:
        """Raise UserError unless there are documents to train on and documents to evaluate on."""
        if not self.round.documents or not self._retained:
            raise UserError(
                f"data.held_out: got {self._held_out}, which leaves {self.round.documents} documents to train on and"
                f" {self._retained} to evaluate on; choose a share that leaves some to both, or add documents"
                " (a .txt file is split at blank lines)"
            )

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.round.__exit__()
        self._held_out_file.close()


def _batch(stream: Iterator[str]) -> list[str]:
    """Return the next documents; the stream is not read ahead, so that the reader's position is the batch's end."""
    texts: list[str] = []
    characters = 0
    for text in stream:
        texts.append(text)
        characters += len(text)
        if len(texts) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            break
    return texts
