"""Paired differences compared with closed forms."""

import math

import numpy as np
import pytest

from suite.inference.paired import GROUPS, differences


def mean(values):
    return sum(values) / len(values)


def samples(values, persons=None):
    return [
        {"doc": {} if persons is None else {"person": persons[index]}, "acc": value}
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize("n", [2, 17, GROUPS])
def test_the_error_of_a_mean_is_that_of_the_differences(n: int) -> None:
    generator = np.random.default_rng(n)
    ours, theirs = generator.normal(size=n), generator.normal(size=n)
    got = differences(samples(ours), samples(theirs), {"acc": mean, "absent": mean})
    assert got == {
        "acc": {
            "reference": pytest.approx(theirs.mean()),
            "difference": pytest.approx((ours - theirs).mean()),
            "stderr": pytest.approx((ours - theirs).std(ddof=1) / math.sqrt(n)),
        }
    }


def test_documents_about_one_person_are_not_independent() -> None:
    generator = np.random.default_rng(0)
    by_person = generator.normal(size=20)
    ours = np.repeat(by_person, 6)
    got = differences(samples(ours, np.repeat(range(20), 6).tolist()), samples(0 * ours), {"acc": mean})
    assert got["acc"]["stderr"] == pytest.approx(by_person.std(ddof=1) / math.sqrt(20))


def test_the_error_of_a_sum_is_too_small_by_one_group() -> None:
    values = np.random.default_rng(1).normal(size=30)
    got = differences(samples(values), samples(0 * values), {"acc": sum})
    assert got["acc"]["stderr"] == pytest.approx(29 / 30 * values.std(ddof=1) * math.sqrt(30))


def test_many_documents_are_grouped() -> None:
    values = np.random.default_rng(2).normal(size=5000)
    got = differences(samples(values), samples(0 * values), {"acc": mean})
    assert got["acc"]["stderr"] == pytest.approx(1 / math.sqrt(5000), rel=0.35)


def test_one_document_has_no_error() -> None:
    assert differences(samples([1.0]), samples([0.0]), {"acc": mean})["acc"]["stderr"] is None
