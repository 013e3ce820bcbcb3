"""Text on disk: .txt, .jsonl, .jsonl.gz and .parquet, one file or a folder of them, as a stream of documents.

A record of a .jsonl or .parquet file is a document. A .txt file is cut into documents at blank lines once 2,000
characters have come together, so that any text has documents to hold out. What is held out is decided by each
document's own hash: it depends neither on order nor on the other documents, and equal documents go the same way.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from suite.data import fingerprints
from suite.data.reader import text_of
from suite.data.resumable_writer import Progress
from suite.data.sources.registry import register
from suite.data.sources.streams import StreamData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.identity import NOT_IDENTITY

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_ALLOWED = "a .txt, .jsonl, .jsonl.gz or .parquet file or a folder of them"
_TEXT_DOCUMENT = 2000  # characters
_PARQUET_ROWS = 256  # decoded at once


@register
class TextData(StreamData):
    """Text on disk, found by its path and identified by its content."""

    kind: Literal["text"] = Field(description="text files on disk")
    path: str = Field(json_schema_extra=NOT_IDENTITY, description="a file or a folder of files")
    fingerprint: str | None = Field(default=None, description="sha256 of the content; filled in by the sweep")
    field: str = Field(default="text", description="the text's field in .jsonl and .parquet records")
    held_out: float = Field(default=0.05, gt=0.0, lt=1.0, description="share of documents held out for evaluation")
    seq_len: int = Field(default=256, gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = TokenizerConfig(kind="bpe", vocab_size=4096)

    determines_content: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """See DataConfig."""
        return self.path

    def identified(self) -> Self:
        """See DataConfig."""
        config = super().identified()
        if config.fingerprint is not None:
            return config
        path = Path(self.path)
        return config.model_copy(update={"fingerprint": fingerprints.cached(fingerprint, path, files(path))})

    def reader(self, position: Any = None) -> FileReader:
        """See StreamData."""
        return FileReader(Path(self.path), self.field, position)

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        path = Path(self.path)
        fingerprints.check("data", path, fingerprint(path), self.fingerprint)
        super().write(folder, progress)


class FileReader:
    """The documents of `path` that are not blank, in the order of the files' names; memory: one record.

    Its position is [file, records of it]. Raises UserError naming file and line for what cannot be read.
    """

    def __init__(self, path: Path, field: str, position: Any = None) -> None:
        self._path, self._field = path, field
        self._files = files(path)
        self._sizes = [file.stat().st_size for file in self._files]
        self._open: BufferedReader | None = None
        self.position: list[int] = list(position or (0, 0))
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        """The documents from the position on."""
        empty = self.position == [0, 0]
        for number, file in enumerate(self._files):
            if number < self.position[0]:
                continue
            skipped = self.position[1] if number == self.position[0] else 0
            with _opened(file) as self._open:
                for record, text in enumerate(self._texts(file, self._open), start=1):
                    if record > skipped and text.strip():
                        empty = False
                        self.position = [number, record]
                        yield text
            self.position = [number + 1, 0]
        if empty:
            raise UserError(f"data.path: got {str(self._path)!r}, which holds no text, allowed: at least one document")

    @property
    def share(self) -> float:
        """Bytes read over bytes in all files."""
        before = sum(self._sizes[: self.position[0]])
        here = self._open.tell() if self._open is not None and not self._open.closed else 0
        return min(1.0, (before + here) / max(1, sum(self._sizes)))

    def _texts(self, file: Path, opened: BufferedReader) -> Iterator[str]:
        if file.suffix == ".txt":
            return _paragraphs(file, opened)
        records = _rows(file, opened, self._field) if file.suffix == ".parquet" else _records(file, opened)
        return (_text(place, record, self._field) for place, record in records)


def files(path: Path) -> list[Path]:
    """The corpus's files in the order they are read. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"data.path: got {str(path)!r}, which does not exist, allowed: {_ALLOWED}")
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in inside if file.name.endswith(SUFFIXES)]
    else:
        found = [path] if path.name.endswith(SUFFIXES) else []
    if not found:
        raise UserError(f"data.path: got {str(path)!r}, with no text in it, allowed: {_ALLOWED}")
    return found


def fingerprint(path: Path) -> str:
    """sha256 of the content: kinds and bytes of the files, wherever they lie and whatever their names."""
    digest = hashlib.sha256()
    for file in files(path):
        kind = next(suffix for suffix in SUFFIXES if file.name.endswith(suffix))
        with _opened(file) as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{kind} {content}\n".encode())
    return digest.hexdigest()


def _opened(file: Path) -> BufferedReader:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _text(place: str, record: Any, field: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{place}: got a {type(record).__name__}, allowed: one object a line")
    return text_of(place, record, field)


def _lines(file: Path, opened: BufferedReader) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for line in gzip.GzipFile(fileobj=opened) if file.suffix == ".gz" else opened:
            text = line.decode("utf-8" if number else "utf-8-sig")
            number += 1
            yield number, text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number + 1}: got the byte 0x{error.object[error.start]:02x}, allowed: UTF-8 text"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: got a broken gzip stream ({error}), allowed: a whole one") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _records(file: Path, opened: BufferedReader) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file, opened):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: got no JSON ({error.msg}), allowed: one object a line") from None


def _rows(file: Path, opened: BufferedReader, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .parquet file; of its columns only `field` is read, a few rows at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(opened)
        columns = table.schema_arrow.names
        if field not in columns:
            known = ", ".join(sorted(columns))
            raise UserError(f"{file}: data.field {field!r}: got only {known}, allowed: a column with texts")
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"{file}:{number}", {field: text}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: got a broken file ({str(error).splitlines()[0]}), allowed: parquet") from None


def _paragraphs(file: Path, opened: BufferedReader) -> Iterator[str]:
    gathered: list[str] = []
    length = 0
    for _, line in _lines(file, opened):
        if not line.strip() and length >= _TEXT_DOCUMENT:
            yield "".join(gathered)
            gathered, length = [], 0
        elif line.strip() or gathered:
            gathered.append(line)
            length += len(line)
    if gathered:
        yield "".join(gathered)
