"""Data read as a stream of documents, some of which are held out for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from suite.atomic import write_text
from suite.data import resumable_writer, tokenizers
from suite.data.reader import Reader, is_held_out
from suite.data.resumable_writer import Progress
from suite.data.sources.registry import DataConfig
from suite.identity import Problem

TOKENIZER = "tokenizer.json"
KINDS = ("bpe", "bytes", "file")
"""The kinds of tokenizers of text."""
BPE_CHARACTERS = 200_000_000
"""A BPE is trained on the beginning of a corpus, up to the document that reaches this many characters."""


class StreamData(DataConfig):
    """Base class of data that a `Reader` reads. A subclass defines `reader`; it can also be a part of a mixture."""

    held_out: float = Field(gt=0.0, lt=1.0, description="share of documents held out for evaluation")

    determines_content: ClassVar[bool] = False

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _refuse_unknown_kind(cls, value: Any) -> Any:
        """Return the block of the tokenizer. Raises ValueError for a kind that no data has, with those of text."""
        kind = value.get("kind", KINDS[0]) if isinstance(value, dict) else KINDS[0]
        if kind not in (*KINDS, "word"):  # problems() refuses `word` with the reason
            raise ValueError(f"kind: got {kind!r}, allowed: {', '.join(KINDS)}")
        return value

    def reader(self, position: Any = None) -> Reader:
        """Return a reader that starts at `position`; None: at the beginning."""
        raise NotImplementedError

    def validation_texts(self) -> Iterable[str] | None:
        """Return the documents to evaluate on, if they are a separate set; then nothing is held out."""
        return None

    @property
    def max_tokens(self) -> int | None:
        """Tokens after which the stream ends, with the document that reaches them; None: at the end of the reader."""
        return None

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        if self.tokenizer.kind == "word":
            return [("tokenizer.kind", "word", f"{', '.join(KINDS)} (kind word knows the words of a bios world only)")]
        return []

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        validation = self.validation_texts()
        held_out = self.held_out if validation is None else 0.0
        if (folder / TOKENIZER).exists():
            tokenizer = tokenizers.load(folder / TOKENIZER)
        else:
            tokenizer = self.tokenizer.build(self._training_texts(held_out, progress))
            write_text(folder / TOKENIZER, tokenizer.to_json())
        resumable_writer.write_stream(
            folder, self.reader, tokenizer, held_out, self.max_tokens, progress, validation=validation
        )

    def _training_texts(self, held_out: float, progress: Progress) -> Iterator[str]:
        """Yield the beginning of the training text, on which a tokenizer is trained once it is read."""
        characters = 0
        progress(0, None, "reading the text to train its tokenizer on")
        for text in self.reader():
            if not is_held_out(text, held_out):
                characters += len(text)
                yield text
            if characters >= BPE_CHARACTERS:
                break
        progress(0, None, f"training its tokenizer on {characters / 1e6:,.1f}M characters")
