"""The `tokenizer` block of a cell, and the tokenizer it describes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from suite.data import fingerprints, tokenizer_files
from suite.data.tokenizers import BPETokenizer, BytesTokenizer, Tokenizer, WordTokenizer
from suite.errors import UserError
from suite.identity import NOT_IDENTITY, Frozen, Problem


class TokenizerConfig(Frozen):
    """How text becomes tokens."""

    kind: Literal["word", "bpe", "bytes", "file"] = Field(description="how text becomes tokens")
    vocab_size: int | None = Field(
        default=None, gt=256, description="for bpe: number of entries, the 256 bytes included"
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        json_schema_extra=NOT_IDENTITY,
        description="for file: a tokenizer.json, a GPT-2 vocab.json or encoder.json (merges next to it), or a .model",
    )
    fingerprint: str | None = Field(default=None, description="for file: sha256 of the content; filled in")
    eot: str | None = Field(default=None, description="for file: its end-of-text token; None: a usual name")
    entries: int | None = Field(
        default=None, gt=0, description="for file: entries of the model's vocabulary; None: those of the tokenizer"
    )

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        problems: list[Problem] = []
        if (self.kind == "bpe") != (self.vocab_size is not None):
            problems.append(("vocab_size", self.vocab_size, "an integer above 256 for bpe, nothing for other kinds"))
        if (self.kind == "file") != (self.path is not None):
            problems.append(("path", self.path, "a tokenizer file for kind file, nothing for other kinds"))
        if self.kind != "file" and self.eot is not None:
            problems.append(("eot", self.eot, "nothing unless kind is file: the other kinds have their own"))
        if self.kind != "file" and self.entries is not None:
            problems.append(("entries", self.entries, "nothing unless kind is file"))
        return problems

    def identified(self) -> Self:
        """Return the block with the fingerprint of its file filled in. Raises UserError if the file cannot be read."""
        if self.kind != "file" or self.fingerprint is not None:
            return self
        path = Path(str(self.path))
        content = fingerprints.cached(tokenizer_files.fingerprint, path, tokenizer_files.files(path))
        return self.model_copy(update={"fingerprint": content})

    def vocabulary(self) -> int:
        """Return the entries of the model's vocabulary, of any kind but word.

        Raises UserError if the tokenizer's file cannot be read.
        """
        stated = self.vocab_size if self.kind == "bpe" else self.entries
        return stated or self.build(()).vocab_size

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Return the tokenizer: read from its file, or made from the texts of a corpus.

        Raises:
            UserError: The file cannot be read or has another fingerprint, or the texts are too small for `vocab_size`.
        """
        if self.kind == "file":
            path = Path(str(self.path))
            fingerprints.check("data.tokenizer.path", path, tokenizer_files.fingerprint(path), self.fingerprint)
            return tokenizer_files.read(path, self.eot)
        if self.kind == "bytes":
            return BytesTokenizer()
        if self.kind == "word":
            return WordTokenizer.of(texts)
        assert self.vocab_size is not None, "problems() requires it for bpe"
        tokenizer = BPETokenizer.train(texts, self.vocab_size)
        if tokenizer.vocab_size < self.vocab_size:
            raise UserError(
                f"data.tokenizer.vocab_size: got {self.vocab_size}, allowed: at most {tokenizer.vocab_size}, all that"
                " this corpus has pairs for"
            )
        return tokenizer
