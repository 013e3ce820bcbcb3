"""Metrics over scored probes of a bios world: bits learned, answer NLL and recall, with standard errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from suite.data.bios import BitsResult, Probe, bits_learned


class Scored(NamedTuple):
    """A probe, the log-probability of its answer and stop in nats, and whether greedy decoding produces them."""

    probe: Probe
    log_p: float
    greedy: bool


def bits(items: Sequence[Scored]) -> float:
    """Bits learned about the people in the probes (see `bits_learned`)."""
    return _learned(items).bits


def bits_se(items: Sequence[Scored]) -> float:
    """Standard error of `bits`, from its spread over people."""
    return _learned(items).stderr


def bits_max(items: Sequence[Scored]) -> float:
    """The entropy of the probed attributes: the bits of a model that knows everything."""
    return _learned(items).bits_max


def nll(items: Sequence[Scored]) -> float:
    """Mean negative log-likelihood of an answer in nats."""
    return sum(-item.log_p for item in items) / len(items)


def nll_se(items: Sequence[Scored]) -> float:
    """Standard error of `nll`, from its spread over people."""
    return _clustered_se([(item.probe.person, -item.log_p) for item in items])


def recall(items: Sequence[Scored]) -> float:
    """Share of probes whose answer, stop included, greedy decoding produces."""
    return sum(item.greedy for item in items) / len(items)


def recall_se(items: Sequence[Scored]) -> float:
    """Standard error of `recall`, from its spread over people."""
    return _clustered_se([(item.probe.person, float(item.greedy)) for item in items])


METRICS = {metric.__name__: metric for metric in (bits, bits_se, bits_max, nll, nll_se, recall, recall_se)}


def _learned(items: Sequence[Scored]) -> BitsResult:
    return bits_learned([item.probe for item in items], [item.log_p / math.log(2) for item in items])


def _clustered_se(values: Sequence[tuple[int, float]]) -> float:
    """Standard error of a mean over (cluster, value): values of one cluster are not independent."""
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    for cluster, value in values:
        sums[cluster] += value
        counts[cluster] += 1
    if len(sums) < 2:
        return 0.0
    mean = sum(sums.values()) / len(values)
    square = sum((sums[cluster] - mean * counts[cluster]) ** 2 for cluster in sums)
    return math.sqrt(square * len(sums) / (len(sums) - 1)) / len(values)
