"""Synthetic biographies as a data source (Allen-Zhu and Li, Physics of Language Models 3.3)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from suite.atomic import write_text
from suite.data import shards
from suite.data.bios import text
from suite.data.bios.world import MAX_PEOPLE, World
from suite.data.packing import DocumentPacking, Packing
from suite.data.resumable_writer import Progress
from suite.data.shards import META, Round
from suite.data.sources.registry import DataConfig, register
from suite.data.sources.streams import TOKENIZER
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.identity import Problem

QUICK_PEOPLE = 5_000
"""Worlds up to this size are prepared in seconds."""


@register
class BiosData(DataConfig):
    """Biographies of invented people: a pure function of these fields."""

    kind: Literal["bios"] = Field(description="biographies of invented people")
    people: int = Field(gt=1, description="people in the world")
    world: int = Field(default=0, ge=0, description="seed of names, attributes and the use of templates")
    questions: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the people whose questions are in the training text"
    )
    zipf: float = Field(default=0.0, ge=0.0, le=10.0, description="exponent of exposure against popularity; 0: uniform")
    seq_len: int = Field(default=128, gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = TokenizerConfig(kind="word")

    determines_content: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """See DataConfig."""
        return f"bios of {self.people} people, world {self.world}"

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        return (
            [("people", self.people, f"at most {MAX_PEOPLE}, all that have a name")] if self.people > MAX_PEOPLE else []
        )

    def synthetic_world(self) -> World:
        """See DataConfig."""
        return World(self.people, self.world, self.questions, self.zipf)

    @property
    def preparation_load(self) -> float:
        """See DataConfig."""
        return self.people / QUICK_PEOPLE

    def task_problem(self, documents: str) -> Problem | None:
        """See DataConfig."""
        if documents == "held_out":
            return "kind", self.kind, "a kind of text"
        if documents in ("storage", "paraphrase") or 0 < round(self.questions * self.people) < self.people:
            return None
        allowed = "a share with which the training text has questions about some people and not about others"
        return "questions", self.questions, allowed

    def shard_format(self) -> dict[str, Any]:
        """See DataConfig."""
        return {"template_set": text.TEMPLATE_SET}

    def write(self, folder: Path, progress: Progress) -> None:
        """See DataConfig."""
        world = self.synthetic_world()
        tokenizer = self.tokenizer.build(self._vocabulary_texts(world))
        for index in range(text.ROUNDS):
            shards.write_round(folder, index, world.documents(index), tokenizer)
        write_text(folder / TOKENIZER, tokenizer.to_json())
        write_text(folder / META, json.dumps({"rounds": text.ROUNDS}))

    def check_rounds(self, rounds: Sequence[Round]) -> None:
        """See DataConfig."""
        longest = max(int(r.lengths.max()) for r in rounds)
        if longest > self.seq_len:
            raise UserError(f"data.seq_len: got {self.seq_len}, allowed: at least {longest}, the longest document")

    def packing(self, parts: Sequence[Sequence[Round]], eot_id: int, seed: int) -> Packing:
        """See DataConfig."""
        return DocumentPacking(parts[0], self.seq_len, eot_id, seed)

    def vocabulary(self) -> int:
        """See DataConfig."""
        if self.tokenizer.kind != "word":
            return super().vocabulary()
        return self.tokenizer.build(self._vocabulary_texts(self.synthetic_world())).vocab_size

    def _vocabulary_texts(self, world: World) -> Iterator[str]:
        """Yield the texts for the tokenizer: all words of worlds of this size, or the training text for a BPE."""
        if self.tokenizer.kind == "word":
            yield from world.vocabulary_texts()
        else:
            for index in range(text.ROUNDS):
                yield from world.documents(index)
