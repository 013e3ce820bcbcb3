"""Tokens on disk: for each round a file of tokens and a file of document starts, read through memory maps.

A document is stored as one end-of-text token followed by its tokens. A folder of shards is complete or absent: it is
written as `<folder>.partial` under a lock, flushed to disk, and renamed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from suite.atomic import writing
from suite.data.tokenizers import Tokenizer
from suite.errors import UserError

META = "meta.json"
_ENCODE_AT_ONCE = 1024  # documents


@dataclass(frozen=True)
class Round:
    """One pass over facts or text. tokens [T] uint16 or uint32; starts [documents + 1] int64, the last T."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    starts: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens of each document, its end-of-text token included."""
        return np.diff(self.starts)


class RoundFile:
    """A round that documents are appended to; opening it truncates it to what has been committed."""

    def __init__(self, folder: Path, index: int, vocab_size: int, documents: int = 0, tokens: int = 0) -> None:
        self.documents, self.tokens = documents, tokens
        self._dtype = _token_dtype(vocab_size)
        self._tokens = open_truncated(_tokens_path(folder, index), tokens * np.dtype(self._dtype).itemsize)
        self._starts = open_truncated(_starts_path(folder, index), (documents + 1) * 8 if documents else 0)
        if not documents:
            self._starts.write(np.zeros(1, np.int64).tobytes())

    def append(self, encoded: Sequence[Sequence[int]]) -> bytes:
        """Add documents, each starting with its end-of-text token, and return the bytes of their tokens."""
        if not encoded:
            return b""
        ends = self.tokens + np.cumsum(np.array([len(tokens) for tokens in encoded], dtype=np.int64))
        content = np.concatenate([np.array(tokens, dtype=self._dtype) for tokens in encoded]).tobytes()
        self._tokens.write(content)
        self._starts.write(ends.tobytes())
        self.documents += len(encoded)
        self.tokens = int(ends[-1])
        return content

    def flush(self) -> None:
        """Sync everything appended to disk."""
        for file in (self._tokens, self._starts):
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> RoundFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._starts.close()


def write_round(folder: Path, index: int, documents: Iterable[str], tokenizer: Tokenizer) -> int:
    """Encode and write one round, with at most 1,024 documents in memory.

    Args:
        folder: The folder of the shards.
        index: The round.
        documents: The texts.
        tokenizer: Encodes them.

    Returns:
        The number of documents.
    """
    remaining = iter(documents)
    with RoundFile(folder, index, tokenizer.vocab_size) as round_file:
        while texts := list(islice(remaining, _ENCODE_AT_ONCE)):
            round_file.append([[tokenizer.eot_id, *tokens] for tokens in tokenizer.encode_batch(texts)])
        return round_file.documents


def read_round(folder: Path, index: int, vocab_size: int) -> Round:
    """Map one round into memory, read-only.

    Args:
        folder: The folder of the shards.
        index: The round.
        vocab_size: Entries of the vocabulary, which determine the dtype of tokens.

    Returns:
        The round.
    """
    tokens = np.memmap(_tokens_path(folder, index), dtype=_token_dtype(vocab_size), mode="r")
    starts = np.memmap(_starts_path(folder, index), dtype=np.int64, mode="r")
    return Round(tokens.view(np.ndarray), starts.view(np.ndarray))


def _tokens_path(folder: Path, index: int) -> Path:
    return folder / f"round-{index}.tokens"


def _starts_path(folder: Path, index: int) -> Path:
    return folder / f"round-{index}.starts"


def open_truncated(path: Path, size: int) -> BinaryIO:
    """Return the file open for appending, `size` bytes long. Raises ValueError if it is shorter."""
    file = open(path, "ab")  # noqa: SIM115  (the caller closes it)
    if file.tell() < size:
        raise ValueError(f"{path}: {file.tell()} bytes, but {size} have been committed")
    file.truncate(size)
    file.seek(size)
    return file


def _token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def build_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Create `folder` by `write(<folder>.partial)` unless it exists. If several processes call it at once, one writes.

    A process that is killed while writing leaves `<folder>.partial`. If that contains META, it has committed pieces and
    the next `write` resumes from them; otherwise it is removed.

    Raises DiskFull, and UserError if the folder cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{folder.name}.lock").touch()
    except OSError as error:
        raise UserError(
            f"{folder}: is not prepared, and cannot be written ({error.strerror}); use another --results"
        ) from None
    partial = folder.with_name(f"{folder.name}.partial")
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        _remove_uncommitted(partial)
        partial.mkdir(exist_ok=True)
        try:
            with writing(folder):
                write(partial)
                for path in (*partial.iterdir(), partial):
                    _flush(path)
                os.rename(partial, folder)
        except BaseException:
            _remove_uncommitted(partial)
            raise
        _flush(folder.parent)


def _remove_uncommitted(partial: Path) -> None:
    if not (partial / META).exists():
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
