"""A prepared corpus: tokenizer, shards, and held-out documents; cached on disk by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from suite.data import resumable_writer, shards, tokenizers
from suite.data.canonical_ids import canonical_ids
from suite.data.loader import Loader
from suite.data.resumable_writer import HELD_OUT, Progress
from suite.data.shards import META, Round
from suite.data.sources.registry import DataConfig
from suite.data.sources.streams import TOKENIZER
from suite.data.tokenizers import Tokenizer
from suite.errors import UserError
from suite.identity import identity

FORMAT = 1  # increment when the shards of an unchanged configuration change


@dataclass(frozen=True)
class Part:
    """One folder of shards: its rounds, and the metadata recorded when it was written."""

    folder: Path
    rounds: list[Round]
    meta: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of all rounds, end-of-text tokens included."""
        return sum(len(r.tokens) for r in self.rounds)

    def held_out(self) -> Iterator[str]:
        """Yield the documents held out for evaluation."""
        if (self.folder / HELD_OUT).exists():
            with open(self.folder / HELD_OUT, encoding="utf-8", newline="\n") as file:
                yield from (json.loads(line)["text"] for line in file)


class Corpus:
    """The training data of a run: one part, or several for a mixture. `fingerprint` identifies the content.

    bios data has a `world`; streams have `held_out` documents. All parts share the tokenizer.
    """

    def __init__(self, config: DataConfig, folders: Sequence[Path]) -> None:
        self.config = config
        self.tokenizer: Tokenizer = tokenizers.load(folders[0] / TOKENIZER)
        self.vocab_size: int = self._entries()
        self.parts = [self._part(folder) for folder in folders]
        self.fingerprint: str = self._fingerprint()
        self.world = config.synthetic_world()
        for part in self.parts if config.has_text else ():
            config.check_rounds(part.rounds)

    def _entries(self) -> int:
        """Return the entries of the model's vocabulary, which may be more than those of the tokenizer."""
        entries, present = self.config.tokenizer.entries, self.tokenizer.vocab_size
        if entries is not None and entries < present:
            raise UserError(
                f"data.tokenizer.entries: got {entries}, allowed: at least {present}, those of the tokenizer"
            )
        return entries or present

    def _part(self, folder: Path) -> Part:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return Part(
            folder, [shards.read_round(folder, i, self.tokenizer.vocab_size) for i in range(meta["rounds"])], meta
        )

    def _fingerprint(self) -> str:
        """Return the folder's name where it determines the content, else a hash of the content."""
        if self.config.determines_content:
            return self.parts[0].folder.name
        content = [[part.folder.name, part.meta["content"]] for part in self.parts]
        return _digest({"parts": content, "weights": self.config.weights()})

    @cached_property
    def held_out(self) -> list[str]:
        """The documents held out for evaluation, alternating between the parts of a mixture; none for bios."""
        alternating: list[str] = []
        unread = [part.held_out() for part in self.parts]
        while unread:
            for documents in list(unread):
                text = next(documents, None)
                if text is None:
                    unread.remove(documents)
                else:
                    alternating.append(text)
        return alternating

    def canonical_ids(self) -> list[int]:
        """Return the canonical id of every token."""
        return canonical_ids(self.tokenizer)

    def loader(self, seed: int, batch_rows: int) -> Loader:
        """Return batches of `batch_rows` rows of `config.seq_len` tokens, in the order of `seed`."""
        rounds = [part.rounds for part in self.parts]
        return Loader(self.config.packing(rounds, self.tokenizer.eot_id, seed), batch_rows)


class TokenizerAlone(Corpus):
    """The corpus of a run whose text is not available: its tokenizer, which is enough to score other texts.

    Args:
        config: The `data` block of the run.
        tokenizer: The file of its tokenizer.
        fingerprint: Of the corpus, as the run recorded it.
        reason: Why the text is not available, for errors.
    """

    def __init__(self, config: DataConfig, tokenizer: Path, fingerprint: str, reason: str) -> None:
        self.config, self.parts, self.fingerprint, self._reason = config, [], fingerprint, reason
        self.tokenizer = tokenizers.load(tokenizer)
        self.vocab_size = self._entries()
        self.world = config.synthetic_world()

    @property
    def held_out(self) -> list[str]:
        """Raise UserError: the text is not available."""
        raise UserError(self._reason)

    def loader(self, seed: int, batch_rows: int) -> Loader:
        """Raise UserError: the text is not available."""
        raise UserError(self._reason)


def prepare(config: DataConfig, cache: Path, progress: Progress = resumable_writer.no_progress) -> Corpus:
    """Tokenize the corpus into `cache/<fingerprint>/` unless that exists, and open it.

    A prepared text corpus is opened without its files if the configuration states its fingerprint, and a prepared hub
    data set without the hub. An interrupted preparation resumes after its last committed piece. Each part of a mixture
    has its own folder, shared with a corpus of that part alone.

    Args:
        config: The `data` block of a cell.
        cache: The folder of all prepared corpora.
        progress: Called with the number of tokens written and the fraction done.

    Raises:
        UserError: The data cannot be read or used.
    """
    return Corpus(config, [_folder(corpus, cache, progress) for corpus in config.corpora().values()])


def _folder(config: DataConfig, cache: Path, progress: Progress) -> Path:
    """Return the folder of the configuration's shards, written if it does not exist."""
    config = config.identified()
    folder = cache / _key(config)
    shards.build_once(folder, partial(config.write, progress=progress))
    return folder


def _key(config: DataConfig) -> str:
    """Return 24 hex digits of everything that determines the shards; the length of rows does not."""
    content = identity(config) | {"format": FORMAT} | config.shard_format()
    content.pop("seq_len", None)
    return _digest(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
