"""The `data` block of a cell: its base class, and the registry of its kinds.

A data source is one file in this package: a subclass of `DataConfig`, or of `StreamData` for a stream of documents,
decorated with `@register` and imported by the package's `__init__`. Its `kind` selects it in a cell.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from suite.data.bios.world import World
from suite.data.facts import Fact
from suite.data.packing import Packing, WindowPacking
from suite.data.resumable_writer import Progress
from suite.data.shards import Round
from suite.data.tokenizer_config import TokenizerConfig
from suite.identity import Frozen, Problem


class DataConfig(Frozen):
    """The fields of every kind of data: a tokenizer, and rows of `seq_len` tokens."""

    kind: str
    seq_len: int = Field(gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = Field(description="a tokenizer")

    determines_content: ClassVar[bool]
    """Whether the identified configuration determines every token. If not, the tokens are fingerprinted."""

    has_text: ClassVar[bool] = True
    """Whether there is anything to train on."""

    @property
    def rows_per_fact(self) -> int | None:
        """Rows that state one fact, for a stream of new facts; None for all other data."""
        return None

    @classmethod
    def variants(cls) -> Mapping[str, type[Frozen]]:
        """See Frozen."""
        return kinds() if cls is DataConfig else {}

    @property
    def label(self) -> str:
        """The corpus in a few words."""
        raise NotImplementedError

    def identified(self) -> Self:
        """Return the configuration with the fingerprints of its files filled in, except those that are set already.

        Raises:
            UserError: A file cannot be read.
        """
        return self.model_copy(update={"tokenizer": self.tokenizer.identified()})

    def vocabulary(self) -> int:
        """Return the entries of the vocabulary, without a corpus. Raises UserError for an unreadable tokenizer."""
        return self.tokenizer.vocabulary()

    def source_files(self) -> list[str]:
        """Return the files that are read, in order; empty for data without files. Raises UserError."""
        return []

    @property
    def preparation_load(self) -> float:
        """Work of preparing the corpus, in units of the most that a dry run does; infinite if it needs a download."""
        return math.inf

    @property
    def is_quick_to_prepare(self) -> bool:
        """Whether the corpus can be prepared in seconds and without a download, as dry runs do."""
        return self.preparation_load <= 1

    def documents_on_disk(self) -> Iterator[str]:
        """Yield the documents that can be read without a download or preparation. Raises UserError."""
        yield from ()

    def task_problem(self, documents: str) -> Problem | None:
        """Return why a task about documents of the corpus does not suit it; None if it does.

        Args:
            documents: `storage`, `paraphrase`, `extraction`, `qa`, `choice` or `held_out`.
        """
        if documents == "held_out" and self.has_text:
            return None
        return "kind", self.kind, "a kind of text" if documents == "held_out" else "'bios'"

    def corpora(self) -> dict[str | None, DataConfig]:
        """Return the corpora that are prepared separately: the parts of a mixture by name, or this one under None."""
        return {None: self}

    def weights(self) -> list[float]:
        """Return the share of rows read from each of `corpora`, relative to the others."""
        return [1.0]

    def shard_format(self) -> dict[str, Any]:
        """Return settings other than fields that determine the shards."""
        return {}

    def write(self, folder: Path, progress: Progress) -> None:
        """Write the tokenizer and shards to `folder`, which may hold the committed pieces of an interrupted call.

        Args:
            folder: An existing folder.
            progress: Called with the number of tokens written and the fraction done.

        Raises:
            UserError: The data cannot be read or used.
        """
        raise NotImplementedError

    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """Raise UserError if the tokenized documents do not suit the configuration."""

    def packing(self, parts: Sequence[Sequence[Round]], eot_id: int, seed: int) -> Packing:
        """Return the packing of documents into rows.

        Args:
            parts: The rounds of each of `corpora`.
            eot_id: The end-of-text token.
            seed: Seed of the order of rows.
        """
        return WindowPacking(parts[0], self.seq_len, eot_id, seed)

    def new_facts(self) -> list[Fact]:
        """Return the facts of a stream of new facts, in order; empty for all other data. Raises UserError."""
        return []

    def synthetic_world(self) -> World | None:
        """Return the synthetic world that the text describes, if there is one."""
        return None


Config = TypeVar("Config", bound=DataConfig)
Variant = TypeVar("Variant", bound=Frozen)
_KINDS: dict[str, type[DataConfig]] = {}


def register(config: type[Config]) -> type[Config]:
    """Register a class under its `kind`; a class decorator. Raises ValueError if the kind is taken."""
    (kind,) = typing.get_args(config.model_fields["kind"].annotation)
    if kind in _KINDS:
        raise ValueError(f"data kind {kind!r} is registered twice")
    _KINDS[kind] = config
    return config


def kinds() -> dict[str, type[DataConfig]]:
    """Return the registered classes by kind, in the order of registration."""
    return dict(_KINDS)


def select(value: object, classes: Mapping[str, type[Variant]]) -> type[Variant]:
    """Return the class for a block's `kind`. Raises PydanticCustomError if the kind is missing or unknown."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in classes:
        context = {"given": kind, "kinds": list(classes)}
        raise PydanticCustomError("unknown_kind", "kind: got {given}, allowed: {kinds}", context)
    return classes[kind]


def _data_config(value: object) -> DataConfig:
    if isinstance(value, DataConfig):
        return value
    return select(value, kinds()).model_validate(value)


AnyData = Annotated[SerializeAsAny[DataConfig], BeforeValidator(_data_config)]
"""A field that holds any registered kind of data."""
