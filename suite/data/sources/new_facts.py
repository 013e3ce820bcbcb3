"""Streams of new facts after pretraining: one fact after the other, each in several paraphrases, once through in order.

A row is one paraphrase, padded, so that nothing enters its context. A step of `data.paraphrases` rows is one fact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field

from suite.atomic import write_text
from suite.data import fingerprints, shards
from suite.data.bios.new_people import NewPeople
from suite.data.bios.text import ROUNDS
from suite.data.bios.world import NAMES_PER_PERSON, ProbeKind
from suite.data.facts import Fact
from suite.data.packing import OrderedPacking, Packing
from suite.data.reader import parse_object
from suite.data.resumable_writer import Progress
from suite.data.shards import META, Round
from suite.data.sources.bios import BiosData
from suite.data.sources.registry import DataConfig, register
from suite.data.sources.streams import TOKENIZER
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.identity import NOT_IDENTITY, Problem

LISTS: dict[str, ProbeKind] = {"paraphrases": "storage", "unseen": "paraphrase", "questions": "extraction"}
"""Lists of prompts of a record, and the kind of probes that they are."""


class FactStream(DataConfig):
    """Base class of streams of new facts. A subclass defines `new_facts` and `paraphrases`."""

    determines_content: ClassVar[bool] = True
    paraphrases: int = Field(gt=0, description="statements of each fact, one per row")

    @property
    def rows_per_fact(self) -> int:
        """See DataConfig."""
        return self.paraphrases

    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """See DataConfig."""
        longest = int(rounds[0].lengths.max())
        if longest > self.seq_len:
            raise UserError(f"data.seq_len: got {self.seq_len}, allowed: at least {longest}, the longest statement")

    def packing(self, parts: Sequence[Sequence[Round]], eot_id: int, seed: int) -> Packing:
        """See DataConfig."""
        return OrderedPacking(parts[0], self.seq_len, eot_id)

    def write_stream(self, folder: Path, vocabulary: Iterator[str]) -> None:
        """Write the statements of all facts as one round, and the tokenizer, built from the texts of `vocabulary`."""
        tokenizer = self.tokenizer.build(vocabulary)
        statements = (text for fact in self.new_facts() for text in fact.statements(self.paraphrases))
        shards.write_round(folder, 0, statements, tokenizer)
        write_text(folder / TOKENIZER, tokenizer.to_json())
        write_text(folder / META, json.dumps({"rounds": 1}))


@register
class NewPeopleData(FactStream, BiosData):
    """Facts about people that a `bios` world lacks; the other fields are those of the world that the parent knows."""

    kind: Literal["new_people"] = Field(  # type: ignore[assignment]  # a kind of its own, with the fields of bios
        description="new facts: people that a bios world lacks"
    )
    facts: int = Field(gt=0, description="number of new facts")
    paraphrases: int = Field(default=ROUNDS, gt=0, le=ROUNDS, description="statements of each fact, one per row")
    seq_len: int = Field(default=16, gt=1, description="tokens per row; a row holds one statement")
    tokenizer: TokenizerConfig = TokenizerConfig(kind="word")

    @property
    def label(self) -> str:
        """See DataConfig."""
        return f"{self.facts} facts about new people of world {self.world}"

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        free = (NAMES_PER_PERSON - 1) * self.people * len(self.synthetic_world().attributes)
        too_many: list[Problem] = [("facts", self.facts, f"at most {free}, since names are unique")]
        return super().problems() + (too_many if self.facts > free else [])

    def new_facts(self) -> list[Fact]:
        """See DataConfig."""
        return NewPeople(self.people, self.world, self.facts).stream()

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        self.write_stream(folder, self._vocabulary_texts(self.synthetic_world()))


@register
class FactsData(FactStream):
    """Facts in a file of JSON lines: {"answer": .., "paraphrases": [..], "unseen": [..], "questions": [..]}.

    All but `answer` are lists of prompts, which the answer completes; `unseen` and `questions` are optional.
    """

    kind: Literal["facts"] = Field(description="new facts: a file of statements and questions")
    path: str = Field(min_length=1, json_schema_extra=NOT_IDENTITY, description="a .jsonl file of facts")
    fingerprint: str | None = Field(default=None, description="sha256 of the content; filled in by the sweep")
    paraphrases: int = Field(gt=0, description="statements of each fact, one per row")
    seq_len: int = Field(default=64, gt=1, description="tokens per row; a row holds one statement")
    tokenizer: TokenizerConfig = Field(description="the parent's tokenizer")

    @property
    def label(self) -> str:
        """See DataConfig."""
        return f"facts of {self.path}"

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        if self.tokenizer.kind not in ("file", "bytes"):
            allowed = "file, bytes (results/cache holds the tokenizer.json of the parent's data)"
            return [("tokenizer.kind", self.tokenizer.kind, allowed)]
        return []

    def identified(self) -> Self:
        """See DataConfig."""
        config = super().identified()
        if config.fingerprint is not None:
            return config
        return config.model_copy(update={"fingerprint": _fingerprint(Path(config.path))})

    def source_files(self) -> list[str]:
        """See DataConfig."""
        return [self.path]

    def new_facts(self) -> list[Fact]:
        """See DataConfig."""
        path = Path(self.path)
        facts = [
            _fact(f"{path}:{number}", line, self.paraphrases)
            for number, line in enumerate(_read(path).decode().split("\n"), start=1)
            if line.strip()
        ]
        if not facts:
            raise UserError(f"data.path: got {self.path!r}, which holds no fact")
        return facts

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        path = Path(self.path)
        fingerprints.check("data.path", path, _fingerprint(path), self.fingerprint)
        self.write_stream(folder, iter(()))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data.path: got {str(path)!r}, which cannot be read: {error.strerror}") from None


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


def _fact(place: str, line: str, paraphrases: int) -> Fact:
    """Return the fact in a line. Raises UserError, which names the place and the field."""
    record = parse_object(place, line)
    if not isinstance(record.get("answer"), str) or not record["answer"].strip():
        raise UserError(f"{place}: answer: missing, allowed: an object with the text of the answer")
    if unknown := record.keys() - {"answer", *LISTS}:
        raise UserError(f"{place}: {sorted(unknown)[0]}: unknown field, allowed: answer, {', '.join(LISTS)}")
    prompts: dict[ProbeKind, tuple[str, ...]] = {}
    for field, kind in LISTS.items():
        texts = record.get(field, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{place}: {field}: got {texts!r:.40}, allowed: a list of texts")
        prompts[kind] = tuple(texts)
    if len(prompts["storage"]) < paraphrases:
        count = len(prompts["storage"])
        raise UserError(f"{place}: paraphrases: got {count}, allowed: at least data.paraphrases ({paraphrases})")
    return Fact(record["answer"], prompts)
