"""Scoring of short answers: exact match and F1 as SQuAD defines them, and the likelihood of the gold answer.

Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1: lower case, no punctuation, no articles, single
spaces; F1 over the bag of words; the maximum over all accepted answers.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from suite.evaluate.datasets import Doc

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Return lower case, without punctuation and articles, words separated by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction equals a normalised gold answer."""
    return float(any(normalise(prediction) == normalise(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best F1 of word overlap with a gold answer; two answers without words count as equal."""
    return max(_f1(normalise(prediction).split(), normalise(gold).split()) for gold in golds)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def accepted(doc: Doc) -> list[str]:
    """Return every accepted answer of a document, the canonical one first, distinct.

    TriviaQA has `answer.value` and `answer.aliases`, NQ a list, HotpotQA a string.
    """
    answer = doc["answer"]
    if isinstance(answer, dict):
        texts = [answer["value"], *answer["aliases"]]
    else:
        texts = [answer] if isinstance(answer, str) else answer
    return list(dict.fromkeys(text for text in texts if text.strip()))


def canonical(doc: Doc) -> str:
    """Return the canonical answer."""
    return accepted(doc)[0]


def score_generated(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return EM and F1 of one generated answer."""
    return {"em": exact_match(results[0], accepted(doc)), "f1": f1(results[0], accepted(doc))}


def score_likelihoods(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, object]:
    """Return negative log-likelihoods of the accepted answers, one result each, the canonical first.

    `nll`: the canonical answer, nats; `nll_min`: the likeliest answer, nats; `bits_per_byte`: the canonical
    answer per byte, which can be compared between tokenizers; `greedy`: greedy decoding produces the
    canonical answer.
    """
    log_p, is_greedy = results[0]
    return {
        "nll": -log_p,
        "nll_min": -max(log_p for log_p, _ in results),
        "bits_per_byte": (-log_p / math.log(2), len(canonical(doc).encode())),
        "bits_per_byte_se": (-log_p / math.log(2), len(canonical(doc).encode())),
        "greedy": float(is_greedy),
    }


def ratio(items: Sequence[tuple[float, float]]) -> float:
    """Return the sum of the numerators over the sum of the denominators."""
    return sum(top for top, _ in items) / sum(bottom for _, bottom in items)


def ratio_stderr(items: Sequence[tuple[float, float]]) -> float:
    """Return the standard error of `ratio` over documents (linearised); NaN for a single document."""
    count = len(items)
    if count < 2:
        return math.nan
    value = ratio(items)
    mean_bottom = sum(bottom for _, bottom in items) / count
    variance = sum((top - value * bottom) ** 2 for top, bottom in items) / (count - 1)
    return math.sqrt(variance / count) / mean_bottom


def prompt(doc: Doc) -> str:
    """Return `Question: ...?` and `Answer:`, with exactly one question mark."""
    return f"Question: {doc['question'].strip().rstrip('?').rstrip()}?\nAnswer:"
