"""EM and F1 as defined by SQuAD, and the likelihood of answers."""

from __future__ import annotations

import math

import pytest

from suite.evaluate.tasks import answers


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("St. Louis", ["St Louis"], 1.0, 1.0),
        ("an Apple a day", ["apple day"], 1.0, 1.0),
        ("Eiffel Tower in Paris", ["The Eiffel Tower"], 0.0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("tower tower", ["tower"], 0.0, 2 * 0.5 * 1 / 1.5),
        ("Paris", ["London", "Paris, France"], 0.0, 2 * 1 * 0.5 / 1.5),
        ("1988", ["1988"], 1.0, 1.0),
        ("", ["x"], 0.0, 0.0),
        ("The", ["a"], 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(prediction: str, golds: list[str], em: float, f1: float) -> None:
    assert answers.exact_match(prediction, golds) == em
    assert answers.f1(prediction, golds) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", ["yes"]),
        (["14 December 1972 UTC", "December 1972", "December 1972"], ["14 December 1972 UTC", "December 1972"]),
        ({"value": "Kebab", "aliases": ["Kebabs", "Kebab", " "]}, ["Kebab", "Kebabs"]),
    ],
)
def test_accepted_answers_of_every_data_set(answer: object, expected: list[str]) -> None:
    assert answers.accepted({"answer": answer}) == expected
    assert answers.canonical({"answer": answer}) == expected[0]


@pytest.mark.parametrize("question", ["who is it", "who is it?", " who is it ??  "])
def test_prompts_have_one_question_mark(question: str) -> None:
    assert answers.prompt({"question": question}) == "Question: who is it?\nAnswer:"


def test_likelihoods_are_of_the_canonical_and_of_the_best_answer() -> None:
    scores = answers.score_likelihoods({"answer": ["été", "summer"]}, [(-3.0, False), (-2.0, True)])
    assert (scores["nll"], scores["nll_min"], scores["greedy"]) == (3.0, 2.0, 0.0)
    assert scores["bits_per_byte"] == pytest.approx((3.0 / math.log(2), 5))


def test_the_error_of_a_ratio_with_equal_weights_is_that_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert answers.ratio([(v * 5, 5) for v in values]) == pytest.approx(mean)
    assert answers.ratio_stderr([(v * 5, 5) for v in values]) == pytest.approx(error)
    assert math.isnan(answers.ratio_stderr([(1.0, 1.0)]))
