"""Synthetic biographies: invented people, their facts, the text that tells them, and the bits learned of it.

After Allen-Zhu and Li, "Physics of Language Models" part 3.3 (arXiv 2404.05405): N people with attributes
drawn uniformly from K = (200, 100, 50, 300, 100, 28) values, 39.6116 bits a person. Every fact is one short
sentence with the full name. A world is a pure function of its seed, its size, its share of questions, its
exponent and the template set.

Names are pairs of a first and a last name, both from the same number of names, sqrt(8 N): a single name says
little about its bearer, the vocabulary is the same for all worlds of one size, and N0 = `name_space` is about
8 N.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from suite.cells import BiosData
from suite.data import seeded_random
from suite.data.bios_text import (
    ATTRIBUTES,
    FIRST_NAME_ENDING,
    LAST_NAME_ENDING,
    ROUNDS,
    TWO_SYLLABLES,
    Attribute,
    invented_words,
)
from suite.errors import UserError

ProbeKind = Literal["storage", "paraphrase", "extraction"]
NAMES_PER_PERSON = 8
MOST_PEOPLE = TWO_SYLLABLES**2 // NAMES_PER_PERSON
_NAMES, _VALUES, _ASKED, _SENTENCES, _QUESTIONS, _COPIES = range(6)


@dataclass(frozen=True)
class Probe:
    """One question to a model: how likely is `answer` after `prompt`?

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
    """N people and everything said about them. Raises UserError for more people than there are names."""

    def __init__(self, config: BiosData) -> None:
        if config.people > MOST_PEOPLE:
            raise UserError(f"data.people: got {config.people}, allowed: at most {MOST_PEOPLE}, for want of names")
        self.config = config
        self.attributes: tuple[Attribute, ...] = ATTRIBUTES
        self.people = config.people
        self._side = math.isqrt(NAMES_PER_PERSON * self.people - 1) + 1
        self._first = invented_words(self._side, FIRST_NAME_ENDING)
        self._last = invented_words(self._side, LAST_NAME_ENDING)
        self._pairs = seeded_random.permutation(self.name_space, config.world, _NAMES)[: self.people]
        self.values: NDArray[np.int64] = np.stack(
            [
                seeded_random.integers(self.people, k, config.world, _VALUES, attribute)
                for attribute, k in enumerate(self.K)
            ],
            axis=1,
        )
        order = seeded_random.permutation(self.people, config.world, _ASKED)
        self.asked: NDArray[np.int64] = np.sort(order[: round(config.questions * self.people)])
        self.unasked: NDArray[np.int64] = np.sort(order[len(self.asked) :])

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
        """N0: how many full names there are to draw from."""
        return self._side**2

    def name(self, person: int) -> str:
        """The full name, unique in this world."""
        first, last = divmod(int(self._pairs[person]), self._side)
        return f"{self._first[first]} {self._last[last]}"

    @cached_property
    def copies(self) -> NDArray[np.int64]:
        """[people] how often each fact of a person is told in one cycle of ROUNDS rounds.

        Uniform: ROUNDS, once a round. Zipf: in proportion to (person + 1)^-zipf with the same mean, rounded,
        and at least once, so that nobody is never met (which lifts the mean of steep laws a little).
        """
        weights = (np.arange(self.people) + 1.0) ** -self.config.zipf
        return np.maximum(1, np.rint(ROUNDS * weights / weights.mean()).astype(np.int64))

    @property
    def exposures(self) -> NDArray[np.float64]:
        """[people] how often each fact of a person is told in an epoch, on average over a cycle."""
        return self.copies / ROUNDS

    def documents(self, round_index: int) -> Iterator[str]:
        """The sentences, then the question-answer documents of one round, in canonical order."""
        yield from self.sentences(round_index)
        yield from self.questions(round_index)

    def sentences(self, round_index: int) -> Iterator[str]:
        """The facts of one round in the order person, copy, attribute.

        In each round another training template is chosen for a fact; over a cycle of ROUNDS rounds a fact is
        told in every one (with zipf 0).
        """
        return self._told(round_index, self.prompts("storage"), np.arange(self.people), _SENTENCES)

    def questions(self, round_index: int) -> Iterator[str]:
        """The question-answer documents of one round: facts of the asked people, as often as told."""
        return self._told(round_index, self.prompts("extraction"), self.asked, _QUESTIONS)

    def _told(
        self, round_index: int, prompts: list[tuple[str, ...]], people: NDArray[np.int64], stream: int
    ) -> Iterator[str]:
        seed = self.config.world
        shifts = seeded_random.integers(self.people, ROUNDS, seed, _COPIES) if self.config.zipf else None
        rotations = [seeded_random.integers(self.people, len(p), seed, stream, a) for a, p in enumerate(prompts)]
        for person in people.tolist():
            name = self.name(person)
            first = round_index if shifts is None else (round_index - int(shifts[person])) % ROUNDS
            for copy in range(first, int(self.copies[person]), ROUNDS):
                for attribute, templates in enumerate(prompts):
                    template = (int(rotations[attribute][person]) + copy) % len(templates)
                    yield templates[template].format(name=name) + self.answer(person, attribute)

    def prompts(self, kind: ProbeKind) -> list[tuple[str, ...]]:
        """Per attribute the prompts of a kind, with {name} in them."""
        if kind == "storage":
            return [attribute.training for attribute in self.attributes]
        if kind == "paraphrase":
            return [attribute.held_out for attribute in self.attributes]
        return [attribute.asked for attribute in self.attributes]

    def answer(self, person: int, attribute: int) -> str:
        """The true answer, after a space and with its stop."""
        return self.attributes[attribute].answers[int(self.values[person, attribute])]

    def probes(self, kind: ProbeKind, people: Iterable[int] | None = None) -> list[Probe]:
        """Every fact of the people in every template of the kind, in the order person, attribute, template.

        storage: templates seen in training; paraphrase: held-out ones; extraction: questions, asked only of
        people whose questions were never trained on. `people` None: all of them. Raises ValueError if
        extraction is asked of somebody whose questions are part of the training text.
        """
        if people is None:
            people = self.unasked.tolist() if kind == "extraction" else range(self.people)
        chosen = [int(person) for person in people]
        if kind == "extraction" and np.isin(chosen, self.asked).any():
            raise ValueError("extraction is asked of people whose questions are trained on")
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
        """Texts that hold every word of any world of this size: sentences, questions, answers and names."""
        for attribute in self.attributes:
            for prompt in attribute.training + attribute.held_out + attribute.asked:
                yield prompt.format(name="")
            yield from attribute.answers
        yield from self._first
        yield from self._last


@dataclass(frozen=True)
class BitsResult:
    """Bits learned of the people probed.

    bits: B; bits_max: n/6 people x H; nll: mean answer NLL in nats (value and stop); n: facts (person,
    attribute); stderr: of `bits`, from its spread over people (0 for one person).
    """

    bits: float
    bits_max: float
    nll: float
    n: int
    stderr: float


def bits_learned(probes: Sequence[Probe], log2p: Sequence[float] | NDArray[np.float64]) -> BitsResult:
    """B = sum over people i, attributes a of [log2 K_a + mean over templates of log2 p(v_ia, stop | prompt)].

    `log2p[j]` is the log2 probability of probes[j].answer over the full vocabulary; it is never clipped, so a
    confident wrong model is far below 0. (DESIGN.md section 6; Allen-Zhu and Li 2024, section 3.)

    A model that knows only how often each value occurs in its world gets N KL(occurrence | uniform) bits, which
    does not grow with N: about sum over a of (K_a - 1) / (2 ln 2) = 557 in total, standard deviation 28 (a
    likelihood ratio's chi-square law; from 100 people on it stays within 100 bits of that). So 557 bits is what
    "nothing about anybody" comes to, and it is small beside N H from a few hundred people on.
    """
    if len(probes) != len(log2p) or not probes:
        raise ValueError(f"got {len(probes)} probes and {len(log2p)} log-probabilities: as many, at least one")
    told: dict[tuple[int, int], list[float]] = defaultdict(list)
    entropy: dict[tuple[int, int], float] = {}
    for probe, value in zip(probes, log2p, strict=True):
        fact = (probe.person, probe.attribute)
        told[fact].append(float(value))
        entropy[fact] = math.log2(len(probe.candidates))
    means = {fact: sum(values) / len(values) for fact, values in told.items()}
    by_person: dict[int, float] = defaultdict(float)
    for fact, mean in means.items():
        by_person[fact[0]] += entropy[fact] + mean
    gains = np.array(list(by_person.values()))
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
    return BitsResult(
        bits=float(gains.sum()),
        bits_max=sum(entropy.values()),
        nll=-sum(means.values()) / len(means) * math.log(2),
        n=len(means),
        stderr=math.sqrt(len(gains)) * spread,
    )
