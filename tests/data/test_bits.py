"""Bits learned: values for models whose knowledge is known exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from suite.data.bios.metrics import bits_learned
from suite.data.bios.text import ROUNDS
from suite.data.bios.world import Probe, World
from suite.data.tokenizers import BPETokenizer, BytesTokenizer, Tokenizer, WordTokenizer


def world(people: int, seed: int = 0) -> World:
    return World(people, seed)


def uniform(probes: list[Probe]) -> list[float]:
    return [-math.log2(len(probe.candidates)) for probe in probes]


def occurrence(w: World) -> list[np.ndarray]:
    return [np.bincount(w.values[:, a], minlength=k) / w.people for a, k in enumerate(w.K)]


def test_an_oracle_has_all_bits_and_a_uniform_guesser_none() -> None:
    w = world(40)
    probes = w.probes("storage")
    oracle = bits_learned(probes, np.zeros(len(probes)))
    assert oracle.bits == pytest.approx(40 * w.H)
    assert oracle.bits_max == pytest.approx(40 * w.H)
    assert (oracle.nll, oracle.n, oracle.stderr) == (0.0, 240, pytest.approx(0.0, abs=1e-9))
    guess = bits_learned(probes, uniform(probes))
    assert guess.bits == pytest.approx(0.0, abs=1e-9)
    assert guess.nll == pytest.approx(4.5761, abs=5e-5)


@pytest.mark.parametrize("q", [0.25, 0.5, 0.9])
def test_knowing_a_fraction_gives_that_fraction(q: float) -> None:
    w = world(40)
    probes = w.probes("paraphrase")
    guess = uniform(probes)
    log2p = [0.0 if probe.person < q * w.people else g for probe, g in zip(probes, guess, strict=True)]
    assert bits_learned(probes, log2p).bits == pytest.approx(q * w.people * w.H)


def test_templates_are_averaged_in_bits_and_nothing_is_clipped() -> None:
    w = world(2)
    probes = [probe for probe in w.probes("storage", [1]) if probe.attribute == 2]  # K = 50
    result = bits_learned(probes, [0.0, -2.0, -6.0, -1000.0])
    assert result.bits == pytest.approx(math.log2(50) - 252.0)
    assert result.nll == pytest.approx(252.0 * math.log(2))
    assert (result.n, result.bits_max) == (1, pytest.approx(math.log2(50)))


def test_a_wrong_number_of_log_probabilities_is_refused() -> None:
    with pytest.raises(ValueError, match="12 probes and 3"):
        bits_learned(world(2).probes("paraphrase", [0]), [0.0] * 3)


@pytest.mark.parametrize(("people", "seed"), [(200, 1), (1500, 2), (5000, 3), (20000, 4)])
def test_a_model_that_knows_only_the_marginals_gets_557_bits_for_any_world(people: int, seed: int) -> None:
    w = world(people, seed)
    p = occurrence(w)
    probes = w.probes("paraphrase")
    log2p = [math.log2(p[q.attribute][w.values[q.person, q.attribute]]) for q in probes]
    theory = sum(k - 1 for k in w.K) / (2 * math.log(2))
    assert theory == pytest.approx(556.9, abs=0.1)
    assert bits_learned(probes, log2p).bits == pytest.approx(theory, abs=100)


def test_unseen_people_score_zero_within_the_error() -> None:
    seen, unseen = world(2000, 7), world(500, 8)
    p = [(q * seen.people + 1) / (seen.people + len(q)) for q in occurrence(seen)]  # smoothed: no value is at 0
    probes = unseen.probes("paraphrase")
    log2p = [math.log2(p[q.attribute][unseen.values[q.person, q.attribute]]) for q in probes]
    result = bits_learned(probes, log2p)
    assert result.bits <= 2 * result.stderr


def test_stderr_is_that_of_a_sum_over_people() -> None:
    w = world(300)
    rng = np.random.default_rng(0)
    probes = w.probes("storage")
    sums = [bits_learned(probes, rng.normal(-5, 3, len(probes))) for _ in range(200)]
    observed = np.std([s.bits for s in sums])
    assert np.mean([s.stderr for s in sums]) == pytest.approx(observed, rel=0.15)


def tokenizers(w: World) -> list[Tokenizer]:
    texts = [text for r in range(ROUNDS) for text in w.documents(r)]
    return [WordTokenizer.of(w.vocabulary_texts()), BPETokenizer.train(texts, 600), BytesTokenizer()]


def test_candidates_are_prefix_free_and_their_probabilities_sum_to_at_most_one() -> None:
    w = world(50)
    rng = np.random.default_rng(1)
    for tokenizer in tokenizers(w):
        logits = rng.normal(0, 3, (tokenizer.vocab_size, tokenizer.vocab_size))  # a random bigram model
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        for attribute in w.attributes:
            answers = sorted(tuple(tokenizer.encode(answer)) for answer in attribute.answers)
            assert len(set(answers)) == len(attribute.values)
            for one, after in itertools.pairwise(answers):  # sorted, so that a prefix directly precedes
                assert after[: len(one)] != one
            steps = [log_p[list((tokenizer.eot_id, *a)[:-1]), list(a)].sum() for a in answers]
            assert np.exp(steps).sum() <= 1 + 1e-12


def test_prompt_and_answer_encode_separately_to_the_tokens_of_the_whole() -> None:
    w = World(50, questions=0.5)
    for tokenizer in tokenizers(w):
        for kind in ("storage", "paraphrase", "extraction"):
            for probe in w.probes(kind, w.without_questions[:5]):
                parts = tokenizer.encode(probe.prompt) + tokenizer.encode(probe.answer)
                assert parts == tokenizer.encode(probe.prompt + probe.answer)
