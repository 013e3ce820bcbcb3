"""Random numbers that do not change between releases: raw PCG64 words seeded by a tuple of integers.

numpy promises stable streams for its bit generators and seed sequences, not for the methods of `Generator`;
worlds and data orders must not change with a numpy release, so permutations and draws are made here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def raw(count: int, *key: int) -> NDArray[np.uint64]:
    """Return `count` 64-bit words, a pure function of `key` (non-negative integers)."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of range(count), a pure function of `key`."""
    return np.argsort(raw(count, *key), kind="stable")


def integers(count: int, below: int, *key: int) -> NDArray[np.int64]:
    """Return `count` integers in [0, below), uniform to within below / 2^64."""
    return (raw(count, *key) % np.uint64(below)).astype(np.int64)


def shuffled(index: NDArray[np.int64], count: int, *key: int) -> NDArray[np.int64]:
    """Return the images of `index` under a permutation of range(count): a pure function of `key`, in constant memory.

    A Feistel network over the smallest even number of bits that holds `count`, walked until it falls below
    `count` (Black and Rogaway 2002, cycle walking): on average at most four walks.
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = raw(_FEISTEL_ROUNDS, *key)
    result = index.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= count]
    return result.astype(np.int64)


_FEISTEL_ROUNDS = 6


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every bit of the result depends on every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
