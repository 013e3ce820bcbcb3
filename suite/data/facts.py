"""Facts that a model is taught after pretraining: an answer, and prompts that it completes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from suite.data.bios.world import ProbeKind


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        answer: The text after every prompt, with the space before it and its stop.
        prompts: Prompts by kind: those of training (`storage`), other statements (`paraphrase`), questions
            (`extraction`).
        entropy_bits: Bits of the fact before anything is known: log2 of the equally likely answers; 0 if unknown.
    """

    answer: str
    prompts: Mapping[ProbeKind, tuple[str, ...]]
    entropy_bits: float = 0.0

    def statements(self, count: int) -> list[str]:
        """Return the first `count` training texts."""
        return [prompt + self.answer for prompt in self.prompts["storage"][:count]]
