"""Mixtures: named streams, each with a weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, SerializeAsAny, create_model

from suite.data.packing import MIXTURE_BLOCK, MixturePacking, Packing, WindowPacking
from suite.data.shards import Round
from suite.data.sources.registry import DataConfig, kinds, register, select
from suite.data.sources.streams import StreamData
from suite.data.tokenizer_config import TokenizerConfig
from suite.errors import UserError
from suite.identity import Frozen, Problem

SHARED_FIELDS = tuple(DataConfig.model_fields.keys() - {"kind"})
"""Fields of the mixture that hold for all of its parts."""


class Part(Frozen):
    """A stream as a part of a mixture: the fields of its kind except those that all parts share, and a weight."""

    kind: str
    weight: float = Field(gt=0, description="share of the tokens read, relative to the other parts' weights")

    @classmethod
    def variants(cls) -> Mapping[str, type[Part]]:
        """See Frozen."""
        streams = {kind: config for kind, config in kinds().items() if issubclass(config, StreamData)}
        return {kind: part_class(config) for kind, config in streams.items()} if cls is Part else {}

    def fields(self) -> dict[str, Any]:
        """Return the stream's own fields."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "weight"}


@functools.cache
def part_class(stream: type[StreamData]) -> type[Part]:
    """Return the class of a mixture's parts of this kind."""
    fields: Any = {
        name: (info.annotation, info) for name, info in stream.model_fields.items() if name not in SHARED_FIELDS
    }
    return create_model(f"{stream.__name__}Part", __base__=Part, **fields)


def _part(value: object) -> Part:
    return value if isinstance(value, Part) else select(value, Part.variants()).model_validate(value)


@register
class MixtureData(DataConfig):
    """Named parts; training reads rows of each, and therefore tokens, in proportion to its weight."""

    kind: Literal["mixture"] = Field(description="several text and hub sources by weight")
    parts: dict[str, Annotated[SerializeAsAny[Part], BeforeValidator(_part)]] = Field(
        min_length=1, description="parts by name, each a stream such as text or hub, with a weight"
    )
    seq_len: int = Field(default=2048, gt=1, description="tokens per row")
    tokenizer: TokenizerConfig = Field(description="a tokenizer that all parts share: kind file or bytes")

    determines_content: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """See DataConfig."""
        return f"mixture of {', '.join(sorted(self.parts))}"

    def problems(self) -> list[Problem]:
        """Return errors that involve several fields."""
        problems: list[Problem] = []
        if self.tokenizer.kind not in ("file", "bytes"):
            allowed = "file, bytes (train a BPE on one part, then name its tokenizer.json)"
            problems.append(("tokenizer.kind", self.tokenizer.kind, allowed))
        total = sum(part.weight for part in self.parts.values())
        for name, part in self.parts.items():
            if part.weight / total * MIXTURE_BLOCK < 1:
                allowed = f"at least 1/{MIXTURE_BLOCK} of the sum of weights ({total:g})"
                problems.append((f"parts.{name}.weight", part.weight, allowed))
        return problems

    def identified(self) -> Self:
        """See DataConfig."""
        parts = {name: self._identified_part(name, part) for name, part in self.parts.items()}
        return super().identified().model_copy(update={"parts": parts})

    def corpora(self) -> dict[str | None, DataConfig]:
        """See DataConfig."""
        return {name: self._corpus(self.parts[name]) for name in sorted(self.parts)}

    @property
    def preparation_load(self) -> float:
        """See DataConfig."""
        return sum(part.preparation_load for part in self.corpora().values())

    def weights(self) -> list[float]:
        """See DataConfig."""
        return [self.parts[name].weight for name in sorted(self.parts)]

    def packing(self, parts: Sequence[Sequence[Round]], eot_id: int, seed: int) -> Packing:
        """See DataConfig."""
        packings = [
            WindowPacking(rounds, self.seq_len, eot_id, seed, part=number) for number, rounds in enumerate(parts)
        ]
        return MixturePacking(packings, self.weights(), seed)

    def _corpus(self, part: Part) -> StreamData:
        """Return a part as a separate corpus."""
        stream = kinds()[part.kind]
        shared = {name: getattr(self, name) for name in SHARED_FIELDS}
        return cast(StreamData, stream.model_validate(part.fields() | shared))

    def _identified_part(self, name: str, part: Part) -> Part:
        try:
            corpus = self._corpus(part).identified()
        except UserError as error:
            raise UserError(str(error).replace("data.", f"data.parts.{name}.", 1)) from None
        return part.model_copy(update={field: getattr(corpus, field) for field in part.fields()})
