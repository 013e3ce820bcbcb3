"""People that a world lacks, as a stream of new facts about them.

Their names are from the world's name space and their attributes are drawn in the same way, so that the world's
tokenizer knows all words. They are a pure function of the world's seed and size and of the number of facts.
"""

from __future__ import annotations

import math

import numpy as np

from suite.data import seeded_random
from suite.data.bios.world import NAMES, ProbeKind, World
from suite.data.facts import Fact

_NEW_VALUES, _ORDER = 100, 101  # streams of random numbers, other than those of World


class NewPeople(World):
    """The people of `count` new facts, none of whom is in the world of this size and seed."""

    def __init__(self, people: int, seed: int, facts: int) -> None:
        super().__init__(people, seed)
        self.people = -(-facts // len(self.attributes))
        self._pairs = seeded_random.permutation(self.name_space, seed, NAMES)[people : people + self.people]
        self.values = np.stack(
            [
                seeded_random.integers(self.people, k, seed, _NEW_VALUES, attribute)
                for attribute, k in enumerate(self.K)
            ],
            axis=1,
        )
        self.without_questions = np.arange(self.people)
        self._facts = facts

    def stream(self) -> list[Fact]:
        """Return the facts in the order in which they are taught: people and attributes mixed."""
        count = self.people * len(self.attributes)
        order = seeded_random.permutation(count, self.seed, _ORDER)[: self._facts]
        return [self._fact(*divmod(int(number), len(self.attributes))) for number in order]

    def _fact(self, person: int, attribute: int) -> Fact:
        name = self.name(person)
        kinds: tuple[ProbeKind, ...] = ("storage", "paraphrase", "extraction")
        prompts = {kind: tuple(prompt.format(name=name) for prompt in self.prompts(kind)[attribute]) for kind in kinds}
        return Fact(self.answer(person, attribute), prompts, math.log2(self.K[attribute]))
