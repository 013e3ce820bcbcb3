"""Text on disk: a file or a folder of them, as a stream of documents.

A record of a JSON-lines or .parquet file is a document; null and blank ones are skipped. A .txt file is split into
documents at blank lines, as soon as 2,000 characters have been collected, so that any text has documents to hold out.
Each document's own hash decides whether it is held out: the decision depends neither on the order nor on the other
documents, and equal documents are treated equally.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from suite.data import fingerprints
from suite.data.reader import parse_object, text_of
from suite.data.resumable_writer import Progress
from suite.data.sources.registry import register
from suite.data.sources.streams import StreamData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.identity import NOT_IDENTITY, Problem

COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = (
    *(kind + compression for kind in (".txt", ".jsonl") for compression in COMPRESSED),
    *(".json" + compression for compression in COMPRESSED[1:]),
    ".parquet",
)
"""Suffixes of the files that are read in a folder. A plain .json file is usually not text; it is read only if named."""
NOT_DATA = ("readme", "license", "licence")
"""Files of a folder whose names begin with these, and hidden files and folders, are not read."""

_ALLOWED = "a .txt, .jsonl or .parquet file (.json too; .gz and .zst are decompressed), or a folder of them"
_TEXT_DOCUMENT = 2000  # characters
_PARQUET_ROWS = 256  # decoded at once
QUICK_BYTES = 4_000_000
"""Text up to this size is prepared in seconds."""


FINGERPRINTS = {"path": "fingerprint", "validation": "validation_fingerprint"}


@register
class TextData(StreamData):
    """Text on disk, located by its path and identified by its content."""

    kind: Literal["text"] = Field(description="text files on disk")
    path: str = Field(min_length=1, json_schema_extra=NOT_IDENTITY, description="a file or a folder of files")
    fingerprint: str | None = Field(default=None, description="sha256 of the content; filled in by the sweep")
    field: str = Field(default="text", description="the text's field in .jsonl and .parquet records")
    held_out: float = Field(default=0.05, gt=0.0, lt=1.0, description="share of documents held out for evaluation")
    validation: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra=NOT_IDENTITY,
        description="file or folder of the documents to evaluate on; None: hold out a share of `path`",
    )
    validation_fingerprint: str | None = Field(default=None, description="sha256 of `validation`; filled in")
    seq_len: int = Field(default=256, gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = TokenizerConfig(kind="bpe", vocab_size=4096)

    determines_content: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """See DataConfig."""
        return self.path

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        problems = super().problems()
        if self.validation is not None and self.held_out != type(self).model_fields["held_out"].default:
            problems.append(("held_out", self.held_out, "nothing with validation: all of path is trained on"))
        return problems

    def identified(self) -> Self:
        """See DataConfig."""
        config = super().identified()
        updates: dict[str, str] = {}
        for field in ("path", "validation"):
            path, fingerprinted = getattr(config, field), getattr(config, FINGERPRINTS[field])
            if path is not None and fingerprinted is None:
                read = files(Path(path), where=f"data.{field}")
                updates[FINGERPRINTS[field]] = fingerprints.cached(fingerprint, Path(path), read)
        if len(updates) == len(FINGERPRINTS):
            self._refuse_shared_files()
        return config.model_copy(update=updates)

    def _refuse_shared_files(self) -> None:
        """Raise UserError if a file of `validation` is also one of `path`."""
        assert self.validation is not None
        trained = {file.resolve() for file in files(Path(self.path))}
        for file in files(Path(self.validation), where="data.validation"):
            if file.resolve() in trained:
                raise UserError(
                    f"data.validation: got {self.validation!r}, whose file {file} is also trained on (data.path "
                    f"{self.path!r}), allowed: files outside of data.path"
                )

    def source_files(self) -> list[str]:
        """See DataConfig."""
        path = Path(self.path)
        return [str(file.relative_to(path)) if path.is_dir() else str(file) for file in files(path)]

    @property
    def preparation_load(self) -> float:
        """See DataConfig. Raises UserError if no file can be read."""
        return sum(file.stat().st_size for file in files(Path(self.path))) / QUICK_BYTES

    def documents_on_disk(self) -> Iterator[str]:
        """See DataConfig."""
        return iter(self.reader())

    def reader(self, position: Any = None) -> FileReader:
        """See StreamData."""
        return FileReader(Path(self.path), self.field, position)

    def validation_texts(self) -> Iterable[str] | None:
        """See StreamData."""
        if self.validation is None:
            return None
        return FileReader(Path(self.validation), self.field, where="data.validation")

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        for field in ("path", "validation"):
            if (path := getattr(self, field)) is not None:
                actual = fingerprint(Path(path), where=f"data.{field}")
                fingerprints.check(f"data.{field}", Path(path), actual, getattr(self, FINGERPRINTS[field]))
        super().write(folder, progress)


class FileReader:
    """The documents in the files of a path, in the order of their names. Memory: one record.

    Its position is [file, records of that file].

    Args:
        path: A file or folder.
        field: The text's field in records.
        position: Where to resume.
        where: The configuration's field that names the path, for errors.

    Raises:
        UserError: A file cannot be read or the path holds no text; the message names the file and line.
    """

    def __init__(self, path: Path, field: str, position: Any = None, where: str = "data.path") -> None:
        self._path, self._field, self._where = path, field, where
        self._files = files(path, where)
        self._sizes = [file.stat().st_size for file in self._files]
        self._open: BufferedReader | None = None
        self.position: list[int] = list(position or (0, 0))
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the documents from the position on."""
        empty = self.position == [0, 0]
        for number, file in enumerate(self._files):
            if number < self.position[0]:
                continue
            done = self.position[1] if number == self.position[0] else 0
            with _opened(file) as self._open:
                for record, text in enumerate(self._texts(file, self._open), start=1):
                    if record <= done:
                        continue
                    if text.strip():
                        empty = False
                        self.position = [number, record]
                        yield text
                    else:
                        self.skipped += 1
            self.position = [number + 1, 0]
        if empty:
            raise UserError(f"{self._where}: got {str(self._path)!r}, which holds no text; it needs a document")

    @property
    def share(self) -> float:
        """Bytes read, as a fraction of the bytes of all files."""
        before = sum(self._sizes[: self.position[0]])
        here = self._open.tell() if self._open is not None and not self._open.closed else 0
        return min(1.0, (before + here) / max(1, sum(self._sizes)))

    def _texts(self, file: Path, opened: BufferedReader) -> Iterator[str]:
        kind = _kind(file)
        if kind.startswith(".txt"):
            return _paragraphs(file, opened)
        records = _rows(file, opened, self._field) if kind == ".parquet" else _records(file, opened)
        return (text_of(place, record, self._field) for place, record in records)


def files(path: Path, where: str = "data.path") -> list[Path]:
    """Return the files of a path in reading order. `where` names the path in errors. Raises UserError if none."""
    try:
        if not path.exists():
            raise UserError(f"{where}: got {str(path)!r}, which does not exist, allowed: {_ALLOWED}")
        named = [path] if path.name.endswith((*SUFFIXES, ".json")) else []
        data = sorted(_in_folder(path)) if path.is_dir() else named
        unreadable = next((file for file in data if not file.is_file()), None)
    except OSError as error:
        raise UserError(f"{where}: {error.filename}: cannot be read: {error.strerror}; correct or remove it") from None
    if unreadable is not None:
        raise UserError(
            f"{where}: {unreadable}: is a link to a folder or to nothing, or a pipe or socket, allowed: files and "
            "links to files; replace or remove it"
        )
    _refuse_copies(data, where)
    if not data:
        problem = "which holds no such file" if path.is_dir() else "which is not such a file"
        raise UserError(f"{where}: got {str(path)!r}, {problem}, allowed: {_ALLOWED}")
    return data


def _refuse_copies(data: Iterable[Path], where: str) -> None:
    """Raise UserError if two files are one set of documents in two formats, such as x.jsonl and x.jsonl.gz."""
    first: dict[tuple[str, bool], Path] = {}
    for file in data:
        kind = _kind(file)
        stem = str(file).removesuffix(kind), kind.startswith(".txt")
        if (other := first.setdefault(stem, file)) != file:
            raise UserError(
                f"{where}: got {other} and {file.name}, which would be read as different documents; leave one of them, "
                "or rename one that is no copy"
            )


def _in_folder(folder: Path) -> Iterator[Path]:
    """Yield what is read in a folder by its name, and links to folders, which are not followed. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for path in map(Path(parent).joinpath, folders) if path.is_symlink())
        yield from (Path(parent, name) for name in names if _is_data(name))


def _is_data(name: str) -> bool:
    """Return whether a file of a folder is read."""
    return name.endswith(SUFFIXES) and not name.lower().startswith((".", *NOT_DATA))


def _kind(file: Path) -> str:
    return next(suffix for suffix in (*SUFFIXES, ".json") if file.name.endswith(suffix))


def fingerprint(path: Path, where: str = "data.path") -> str:
    """Return the sha256 of the kinds and bytes of the files, not of their paths. `where` names the path in errors."""
    digest = hashlib.sha256()
    for file in files(path, where):
        with _opened(file) as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{_kind(file)} {content}\n".encode())
    return digest.hexdigest()


def _opened(file: Path) -> BufferedReader:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _decompressed(file: Path, opened: BufferedReader) -> Iterable[bytes]:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=opened)
    if file.suffix == ".zst":
        import pyarrow

        return BufferedReader(pyarrow.CompressedInputStream(opened, "zstd"))
    return opened


def _lines(file: Path, opened: BufferedReader) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for line in _decompressed(file, opened):
            text = line.decode("utf-8" if number else "utf-8-sig")
            number += 1
            yield number, text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number + 1}: got the byte 0x{error.object[error.start]:02x}, allowed: UTF-8 text"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: the gzip stream is damaged or incomplete ({error}); copy the file again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or str(error).splitlines()[0]}") from None


def _records(file: Path, opened: BufferedReader) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(file, opened):
        if line.strip():
            place = f"{file}:{number}"
            yield place, parse_object(place, line)


def _rows(file: Path, opened: BufferedReader, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a .parquet file; only the column `field` is read, a few rows at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(opened)
        columns = table.schema_arrow.names
        if field not in columns:
            present = ", ".join(sorted(columns))
            raise UserError(
                f"{file}: data.field {field!r}: not among the columns, which are {present}; allowed: a column with text"
            )
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"{file}:{number}", {field: text}
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a whole parquet file ({str(error).splitlines()[0]}); copy it again") from None


def _paragraphs(file: Path, opened: BufferedReader) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for _, line in _lines(file, opened):
        if not line.strip() and length >= _TEXT_DOCUMENT:
            yield "".join(lines)
            lines, length = [], 0
        elif line.strip() or lines:
            lines.append(line)
            length += len(line)
    if lines:
        yield "".join(lines)
