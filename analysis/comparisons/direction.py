"""Which way a score improves, and how many digits it is written with."""

from __future__ import annotations

LOWER_IS_BETTER = ("nll", "nll_min", "bits_per_byte", "perplexity", "byte_perplexity", "word_perplexity", "loss", "ppl")
"""Metrics that fall as models improve, the last two as papers name them; all others rise."""
OF_THE_DATA = ("bits_max",)
"""Metrics that state what the data holds; no direction is better."""


def lower_is_better(key: str) -> bool:
    """Return whether a score, by its `task/metric`, falls as models improve."""
    return key.rpartition("/")[2] in LOWER_IS_BETTER


def arrow(key: str) -> str:
    """Return the direction in which a score improves, in front of which a space stands; empty without a direction."""
    if key.rpartition("/")[2] in OF_THE_DATA:
        return ""
    return " ↓" if lower_is_better(key) else " ↑"


def digits(key: str) -> int:
    """Return the significant digits of a score: models differ in the third or fourth digit of a likelihood."""
    return 5 if lower_is_better(key) else 3
