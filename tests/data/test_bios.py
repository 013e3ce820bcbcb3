"""Worlds: their constants, their text, the people with questions, and how often facts occur."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter

import numpy as np
import pytest

from suite.data.bios.text import ROUNDS
from suite.data.bios.world import World
from suite.data.sources.bios import BiosData

NAME = r"(?P<name>[A-Z][a-z]+n [A-Z][a-z]+sen)"
# Written by hand, so that the test does not parse the text with the templates that produced it.
SENTENCES = {
    0: r"(born in the city of|native of|birthplace of .* is|life in) (?P<value>\w+ville)\.$",
    1: r"(company|employed by|employer of .* is|job at) (?P<value>\w+co \w+)\.$",
    2: r"(in the year|year of .* is|began in|since) (?P<value>19\d\d)\.$",
    3: r"(graduate of|degree from|student at|mater of .* is) (?P<value>\w+ford \w+)\.$",
    4: r"(subject of|degree in|major of .* was|courses in) (?P<value>[A-Z]\w+ [A-Z]\w+)\.$",
    5: r"(play the|is the|on the|learned the) (?P<value>[a-z]+)\.$",
}


def world(people: int = 60, **options: float) -> World:
    return BiosData.model_validate({"kind": "bios", "people": people, **options}).synthetic_world()


def test_the_constants_give_the_published_entropy_chance_and_uniform_nll() -> None:
    w = world()
    assert w.K == (200, 100, 50, 300, 100, 28)
    assert pytest.approx(39.6116, abs=5e-5) == w.H
    assert np.mean([1 / k for k in w.K]) == pytest.approx(0.014008, abs=5e-7)
    assert np.mean(np.log(w.K)) == pytest.approx(4.5761, abs=5e-5)
    for attribute in w.attributes:
        assert len(set(attribute.values)) == len(attribute.values)
        assert {len(value.split()) for value in attribute.values} <= {1, 2, 3}
        assert len(attribute.training) == ROUNDS


def test_facts_are_recoverable_from_the_text_and_occur_once_per_round() -> None:
    w = world()
    names = {w.name(person): person for person in range(w.people)}
    assert len(names) == w.people
    seen_in = []
    for index in range(ROUNDS):
        facts = {}
        for text in w.sentences(index):
            name = re.search(NAME, text)["name"]
            matches = [(a, m["value"]) for a, pattern in SENTENCES.items() if (m := re.search(pattern, text))]
            assert len(matches) == 1, text
            ((attribute, value),) = matches
            assert (names[name], attribute) not in facts
            facts[names[name], attribute] = value
        expected = {
            (person, a): w.attributes[a].values[w.values[person, a]] for person in range(w.people) for a in SENTENCES
        }
        assert facts == expected
        seen_in.append(set(w.sentences(index)))
    assert len(set.union(*seen_in)) == ROUNDS * w.people * len(SENTENCES), "each round uses another template"


def test_sentences_are_about_nine_words_long() -> None:
    lengths = [len(text.replace(".", " .").split()) for text in world().sentences(0)]
    assert 8 <= np.mean(lengths) <= 10


def test_questions_are_about_the_configured_share_of_people_and_have_the_right_answers() -> None:
    w = world(questions=0.3)
    assert len(w.with_questions) == 18
    assert set(w.with_questions) | set(w.without_questions) == set(range(w.people))
    names = {w.name(person): person for person in range(w.people)}
    for index in range(ROUNDS):
        texts = list(w.questions(index))
        assert len(texts) == 18 * 6
        assert {names[re.search(NAME, text)["name"]] for text in texts} == set(w.with_questions)
        for text in texts:
            question, answer = re.fullmatch(r"Question: (.*\?)\nAnswer: (.*)\.", text).groups()
            person = names[re.search(NAME, question)["name"]]
            assert answer in {w.attributes[a].values[w.values[person, a]] for a in range(6)}


def test_people_in_extraction_probes_do_not_occur_in_training_questions() -> None:
    w = world(questions=0.5)
    tested = {re.search(NAME, p.prompt)["name"] for p in w.probes("extraction")}
    trained = {re.search(NAME, text)["name"] for r in range(ROUNDS) for text in w.questions(r)}
    assert len(tested) == len(trained) == 30
    assert not tested & trained
    assert not any(text.startswith("Question") for r in range(ROUNDS) for text in w.sentences(r))
    with pytest.raises(ValueError, match="extraction"):
        w.probes("extraction", w.with_questions[:1])


def test_storage_probes_are_the_trained_sentences_and_paraphrases_are_not() -> None:
    w = world(questions=0.5)
    trained = {text for r in range(ROUNDS) for text in w.documents(r)}
    storage = [probe.prompt + probe.answer for probe in w.probes("storage")]
    assert len(storage) == w.people * 6 * ROUNDS
    assert set(storage) == {text for r in range(ROUNDS) for text in w.sentences(r)}
    for kind in ("paraphrase", "extraction"):
        probes = w.probes(kind)
        assert not trained & {probe.prompt + probe.answer for probe in probes}
        assert all(probe.candidates[w.values[probe.person, probe.attribute]] == probe.answer for probe in probes)
    prompts = {template for attribute in w.attributes for template in attribute.held_out}
    assert not any(re.match(re.sub(r"\\{name\\}", NAME, re.escape(p)), t) for p in prompts for t in trained)


def test_held_out_sentences_use_only_words_of_training_sentences() -> None:
    def words(templates: tuple[str, ...]) -> set[str]:
        return {word for template in templates for word in template.split()}

    trained = set().union(*(words(attribute.training) for attribute in world().attributes))
    for attribute in world().attributes:
        assert words(attribute.held_out) <= trained


def test_prompts_are_distinct() -> None:
    prompts = Counter(prompt for a in world().attributes for prompt in a.training + a.held_out + a.question_prompts)
    assert set(prompts.values()) == {1}


def test_values_are_drawn_uniformly() -> None:
    w = world(people=20_000, world=5)
    for a, k in enumerate(w.K):
        expected = w.people / k
        chi2 = float(((np.bincount(w.values[:, a], minlength=k) - expected) ** 2 / expected).sum())
        assert abs(chi2 - (k - 1)) < 5 * math.sqrt(2 * (k - 1))


def test_a_world_is_a_function_of_its_fields_alone() -> None:
    # Pinned: worlds must not change with a release of Python or numpy. An intended change increments TEMPLATE_SET.
    text = "\n".join(t for r in range(ROUNDS) for t in world(people=50, world=3, questions=0.4).documents(r))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "75a73daa9b36920c"
    assert list(world(world=1).documents(0)) == list(world(world=1).documents(0))
    assert list(world(world=1).documents(0)) != list(world(world=2).documents(0))


def test_popular_people_occur_more_often_with_zipf() -> None:
    w = world(people=200, zipf=1.0, questions=0.5)
    sentences = Counter(re.search(NAME, text)["name"] for r in range(ROUNDS) for text in w.sentences(r))
    assert [sentences[w.name(person)] for person in range(w.people)] == (6 * w.copies).tolist()
    questions = Counter(re.search(NAME, text)["name"] for r in range(ROUNDS) for text in w.questions(r))
    assert questions == {w.name(person): 6 * w.copies[person] for person in w.with_questions}
    weights = 1 / np.arange(1, 201)
    assert np.abs(w.exposures - weights / weights.mean()).max() <= 0.125 + 1e-9
    assert w.exposures.min() >= 1 / ROUNDS
    per_round = [sum(1 for _ in w.sentences(r)) for r in range(ROUNDS)]
    assert max(per_round) - min(per_round) <= 6 * w.people / 5
