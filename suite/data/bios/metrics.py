"""Metrics over scored probes of a bios world: bits learned, answer NLL and recall, with standard errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from suite.data.bios.world import Probe


@dataclass(frozen=True)
class BitsResult:
    """Bits learned about the people in the probes.

    bits: B; bits_max: n/6 people x H; nll: mean answer NLL in nats (value and stop); n: facts (person,
    attribute); stderr: of `bits`, from its spread over people (NaN for one person).
    """

    bits: float
    bits_max: float
    nll: float
    n: int
    stderr: float


def bits_learned(probes: Sequence[Probe], log2p: Sequence[float] | NDArray[np.float64]) -> BitsResult:
    """B = sum over people i, attributes a of [log2 K_a + mean over templates of log2 p(v_ia, stop | prompt)].

    It is never clipped, so a confident wrong model is far below 0 (Allen-Zhu and Li 2024, section 3).

    A model that knows only how often each value occurs in its world gets N KL(occurrence | uniform) bits, which does
    not grow with N: about sum over a of (K_a - 1) / (2 ln 2) = 557 in total, with standard deviation 28 (the chi-square
    law of a likelihood ratio; from 100 people on it stays within 100 bits of that). So 557 bits is the score of a model
    that knows these frequencies only. It is small compared with N H from a few hundred people on.

    Args:
        probes: Facts, each in several templates.
        log2p: For each probe, the log2 probability of its answer over the full vocabulary.

    Raises:
        ValueError: There are no probes, or the numbers of probes and probabilities differ.
    """
    if len(probes) != len(log2p) or not probes:
        raise ValueError(
            f"got {len(probes)} probes and {len(log2p)} log-probabilities; their numbers must be equal and not 0"
        )
    values_of: dict[tuple[int, int], list[float]] = defaultdict(list)
    entropy: dict[tuple[int, int], float] = {}
    for probe, value in zip(probes, log2p, strict=True):
        fact = (probe.person, probe.attribute)
        values_of[fact].append(float(value))
        entropy[fact] = math.log2(len(probe.candidates))
    means = {fact: sum(values) / len(values) for fact, values in values_of.items()}
    by_person: dict[int, float] = defaultdict(float)
    for fact, mean in means.items():
        by_person[fact[0]] += entropy[fact] + mean
    gains = np.array(list(by_person.values()))
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else math.nan
    return BitsResult(
        bits=float(gains.sum()),
        bits_max=sum(entropy.values()),
        nll=-sum(means.values()) / len(means) * math.log(2),
        n=len(means),
        stderr=math.sqrt(len(gains)) * spread,
    )


class Scored(NamedTuple):
    """A probe, the log-probability of its answer and stop in nats, and whether greedy decoding produces them."""

    probe: Probe
    log_p: float
    greedy: bool


def bits(items: Sequence[Scored]) -> float:
    """Return bits learned about the people in the probes (see `bits_learned`)."""
    return _learned(items).bits


def bits_se(items: Sequence[Scored]) -> float:
    """Return the standard error of `bits`, from its spread over people."""
    return _learned(items).stderr


def bits_max(items: Sequence[Scored]) -> float:
    """Return the entropy of the probed attributes: the bits of a model that knows everything."""
    return _learned(items).bits_max


def nll(items: Sequence[Scored]) -> float:
    """Return the mean negative log-likelihood of an answer in nats."""
    return sum(-item.log_p for item in items) / len(items)


def nll_se(items: Sequence[Scored]) -> float:
    """Return the standard error of `nll`, from its spread over people."""
    return _clustered_se([(item.probe.person, -item.log_p) for item in items])


def recall(items: Sequence[Scored]) -> float:
    """Return the share of probes whose answer, stop included, greedy decoding produces."""
    return sum(item.greedy for item in items) / len(items)


def recall_se(items: Sequence[Scored]) -> float:
    """Return the standard error of `recall`, from its spread over people."""
    return _clustered_se([(item.probe.person, float(item.greedy)) for item in items])


METRICS = {metric.__name__: metric for metric in (bits, bits_se, bits_max, nll, nll_se, recall, recall_se)}


def _learned(items: Sequence[Scored]) -> BitsResult:
    return bits_learned([item.probe for item in items], [item.log_p / math.log(2) for item in items])


def _clustered_se(values: Sequence[tuple[int, float]]) -> float:
    """Return the standard error of a mean over (cluster, value): values of one cluster are not independent.

    NaN for a single cluster.
    """
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    for cluster, value in values:
        sums[cluster] += value
        counts[cluster] += 1
    if len(sums) < 2:
        return math.nan
    mean = sum(sums.values()) / len(values)
    square = sum((sums[cluster] - mean * counts[cluster]) ** 2 for cluster in sums)
    return math.sqrt(square * len(sums) / (len(sums) - 1)) / len(values)
