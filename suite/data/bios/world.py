"""Synthetic biographies: invented people, their facts, and the text that states the facts.

After Allen-Zhu and Li, "Physics of Language Models" part 3.3 (arXiv 2404.05405): N people with attributes
drawn uniformly from K = (200, 100, 50, 300, 100, 28) values, 39.6116 bits per person. Every fact is one short
sentence with the full name. A world is a pure function of its seed, its size, its share of questions, its
exponent and the template set.

A name is a pair of a first and a last name, each drawn from sqrt(8 N) names. A single name therefore reveals little
about a person, all worlds of one size share a vocabulary, and N0 = `name_space` is about 8 N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from suite.data import seeded_random
from suite.data.bios.text import (
    ATTRIBUTES,
    FIRST_NAME_ENDING,
    LAST_NAME_ENDING,
    ROUNDS,
    TWO_SYLLABLES,
    Attribute,
    invented_words,
)

ProbeKind = Literal["storage", "paraphrase", "extraction"]
NAMES_PER_PERSON = 8
MAX_PEOPLE = TWO_SYLLABLES**2 // NAMES_PER_PERSON
NAMES, _VALUES, _QUESTIONED, _SENTENCES, _QUESTIONS, _COPIES = range(6)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Probe:
    """A fact to test: how probable is `answer` after `prompt`?

    `answer` begins with a space and ends with its stop; `candidates` are all K answers of the attribute.
    `attribute` indexes World.attributes, `template` the prompts of the probe's kind.
    """

    person: int
    attribute: int
    template: int
    prompt: str
    answer: str
    candidates: tuple[str, ...]


class World:
    """N people, at most MAX_PEOPLE, and the text about them.

    Args:
        people: N.
        seed: Seed of names, attributes and the use of templates.
        questions: Share of the people whose questions are in the training text.
        zipf: Exponent of exposure against popularity; 0: uniform.
    """

    def __init__(self, people: int, seed: int = 0, questions: float = 0.0, zipf: float = 0.0) -> None:
        self.people, self.seed, self._zipf = people, seed, zipf
        self.attributes: tuple[Attribute, ...] = ATTRIBUTES
        self._side = math.isqrt(NAMES_PER_PERSON * self.people - 1) + 1
        self._first = invented_words(self._side, FIRST_NAME_ENDING)
        self._last = invented_words(self._side, LAST_NAME_ENDING)
        self._pairs = seeded_random.permutation(self.name_space, seed, NAMES)[: self.people]
        self.values: NDArray[np.int64] = np.stack(
            [seeded_random.integers(self.people, k, seed, _VALUES, attribute) for attribute, k in enumerate(self.K)],
            axis=1,
        )
        order = seeded_random.permutation(self.people, seed, _QUESTIONED)
        self.with_questions: NDArray[np.int64] = np.sort(order[: round(questions * self.people)])
        self.without_questions: NDArray[np.int64] = np.sort(order[len(self.with_questions) :])

    @property
    def K(self) -> tuple[int, ...]:
        """Number of values of each attribute."""
        return tuple(len(attribute.values) for attribute in self.attributes)

    @property
    def H(self) -> float:
        """Entropy of one person's attributes in bits: sum of log2 K."""
        return sum(math.log2(k) for k in self.K)

    @property
    def name_space(self) -> int:
        """N0: the number of full names from which names are drawn."""
        return self._side**2

    def name(self, person: int) -> str:
        """Return the full name, unique in this world."""
        first, last = divmod(int(self._pairs[person]), self._side)
        return f"{self._first[first]} {self._last[last]}"

    @cached_property
    def copies(self) -> NDArray[np.int64]:
        """[people] how often each fact of a person occurs in one cycle of ROUNDS rounds.

        Uniform: ROUNDS, once per round. Zipf: proportional to (person + 1)^-zipf with the same mean, rounded, and at
        least 1 so that everybody occurs, which slightly raises the mean of steep distributions.
        """
        weights = (np.arange(self.people) + 1.0) ** -self._zipf
        return np.maximum(1, np.rint(ROUNDS * weights / weights.mean()).astype(np.int64))

    @property
    def exposures(self) -> NDArray[np.float64]:
        """[people] how often each fact of a person occurs per epoch, averaged over a cycle."""
        return self.copies / ROUNDS

    def documents(self, round_index: int) -> Iterator[str]:
        """Yield the sentences, then the question-answer documents of one round, in canonical order."""
        yield from self.sentences(round_index)
        yield from self.questions(round_index)

    def sentences(self, round_index: int) -> Iterator[str]:
        """Yield the facts of one round in the order person, copy, attribute.

        Each round uses another training template for a fact; a cycle of ROUNDS rounds uses all of them (with zipf 0).
        """
        return self._texts(round_index, self.prompts("storage"), np.arange(self.people), _SENTENCES)

    def questions(self, round_index: int) -> Iterator[str]:
        """Yield the question-answer documents of one round, about the people in `with_questions`."""
        return self._texts(round_index, self.prompts("extraction"), self.with_questions, _QUESTIONS)

    def _texts(
        self, round_index: int, prompts: list[tuple[str, ...]], people: NDArray[np.int64], stream: int
    ) -> Iterator[str]:
        seed = self.seed
        shifts = seeded_random.integers(self.people, ROUNDS, seed, _COPIES) if self._zipf else None
        rotations = [seeded_random.integers(self.people, len(p), seed, stream, a) for a, p in enumerate(prompts)]
        for person in people.tolist():
            name = self.name(person)
            first = round_index if shifts is None else (round_index - int(shifts[person])) % ROUNDS
            for copy in range(first, int(self.copies[person]), ROUNDS):
                for attribute, templates in enumerate(prompts):
                    template = (int(rotations[attribute][person]) + copy) % len(templates)
                    yield templates[template].format(name=name) + self.answer(person, attribute)

    def prompts(self, kind: ProbeKind) -> list[tuple[str, ...]]:
        """Return the prompts of a kind for each attribute, with {name} in them."""
        if kind == "storage":
            return [attribute.training for attribute in self.attributes]
        if kind == "paraphrase":
            return [attribute.held_out for attribute in self.attributes]
        return [attribute.question_prompts for attribute in self.attributes]

    def answer(self, person: int, attribute: int) -> str:
        """Return the true answer, with the space before it and its stop."""
        return self.attributes[attribute].answers[int(self.values[person, attribute])]

    def probes(self, kind: ProbeKind, people: Iterable[int] | None = None) -> list[Probe]:
        """Return every fact of the people in every template of the kind, in the order person, attribute, template.

        Args:
            kind: `storage` for the templates of training, `paraphrase` for held-out ones, `extraction` for questions,
                only about people whose questions are not in the training text.
            people: Indices; None: all people for whom the kind is defined.

        Raises:
            ValueError: Extraction is requested for a person whose questions are in the training text.
        """
        if people is None:
            people = self.without_questions.tolist() if kind == "extraction" else range(self.people)
        chosen = [int(person) for person in people]
        if kind == "extraction" and np.isin(chosen, self.with_questions).any():
            raise ValueError("extraction is defined for people whose questions are not in the training text")
        return [
            Probe(
                person,
                index,
                template,
                prompt.format(name=name),
                self.answer(person, index),
                self.attributes[index].answers,
            )
            for person in chosen
            for name in (self.name(person),)
            for index, templates in enumerate(self.prompts(kind))
            for template, prompt in enumerate(templates)
        ]

    def vocabulary_texts(self) -> Iterator[str]:
        """Yield texts that contain every word of any world of this size: sentences, questions, answers and names."""
        for attribute in self.attributes:
            for prompt in attribute.training + attribute.held_out + attribute.question_prompts:
                yield prompt.format(name="")
            yield from attribute.answers
        yield from self._first
        yield from self._last
