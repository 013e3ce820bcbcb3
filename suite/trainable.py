"""Which parameters of a model move in training: the `train.trainable` block of a cell.

Without the block everything moves. With any other kind, every parameter that is not named stays frozen bit for bit, and
so do the statistics of a model (balancing biases of experts, running moments of batch norms).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from suite.identity import Frozen, Problem

Score = Literal["tfidf", "tf", "reads", "random"]


class Trainable(Frozen):
    """A choice of parameters."""

    kind: str

    @classmethod
    def variants(cls) -> Mapping[str, type[Trainable]]:
        """See Frozen."""
        return KINDS if cls is Trainable else {}


class TrainAll(Trainable):
    """Every parameter."""

    kind: Literal["all"] = Field(description="every parameter")


class TrainTables(Trainable):
    """All rows of the value tables, and all experts that tokens choose."""

    kind: Literal["tables"] = Field(description="value tables and experts, whole")


class TrainRows(Trainable):
    """The best rows of each table at each step (sparse memory finetuning, arXiv 2510.15103, section 3).

    A row of a table is a value row, an n-gram's or token's row, a pair of PEER's rows, or an expert that tokens choose.
    """

    kind: Literal["rows"] = Field(description="the best rows of each table, and the best experts, of each step")
    top: int | None = Field(default=None, gt=0, description="rows of each table per step; None: all that it reads")
    score: Score = Field(
        default="tfidf",
        description="rank of the rows that a step reads: reads against background reads, reads alone (tf), random, or "
        "none (reads: train all of them)",
    )
    background: int = Field(default=1000, gt=0, description="tfidf: batches of the parent's data that are counted")

    def problems(self) -> list[Problem]:
        """See Frozen."""
        if (self.top is None) != (self.score == "reads"):
            allowed = "None with score reads, which trains all rows read" if self.score == "reads" else "a number"
            return [("top", self.top, allowed)]
        return []


class TrainLoRA(Trainable):
    """Low-rank additions to matrices (Hu et al. 2021, arXiv 2106.09685), with the conventions of peft."""

    kind: Literal["lora"] = Field(description="low-rank additions to matrices")
    rank: int = Field(gt=0, description="rank of the additions")
    alpha: float | None = Field(default=None, gt=0, description="scale: alpha / rank; None: rank")
    modules: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="ends of module names, e.g. attention.wq or w1; None: all matrices inside blocks",
    )


class TrainParameters(Trainable):
    """The parameters whose whole name matches one of the patterns."""

    kind: Literal["parameters"] = Field(description="parameters by name")
    patterns: tuple[str, ...] = Field(
        strict=False, min_length=1, description=r"regular expressions, e.g. layers\.\d+\.attention\..*"
    )

    def problems(self) -> list[Problem]:
        """See Frozen."""
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                return [("patterns", pattern, f"regular expressions ({error})")]
        return []


KINDS: dict[str, type[Trainable]] = {
    "all": TrainAll,
    "tables": TrainTables,
    "rows": TrainRows,
    "lora": TrainLoRA,
    "parameters": TrainParameters,
}
EVERYTHING = TrainAll(kind="all")


def _trainable(value: object) -> Trainable:
    if isinstance(value, Trainable):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise PydanticCustomError(
            "unknown_kind", "kind: got {given}, allowed: {kinds}", {"given": kind, "kinds": [*KINDS]}
        )
    return KINDS[kind].model_validate(value)


AnyTrainable = Annotated[SerializeAsAny[Trainable], BeforeValidator(_trainable)]
"""A field that holds any kind of choice."""
