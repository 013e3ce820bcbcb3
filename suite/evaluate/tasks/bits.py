"""The bios tasks: a document is one probe, and the answer with its stop is scored. Task files name these functions."""

from __future__ import annotations

from collections.abc import Sequence

from suite.data.bios.metrics import METRICS, Scored, bits, bits_max, bits_se, nll, nll_se, recall, recall_se
from suite.evaluate.datasets import Doc

__all__ = ["bits", "bits_max", "bits_se", "nll", "nll_se", "recall", "recall_se", "score_probe"]


def score_probe(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Scored]:
    """The scored probe under the name of every metric; lm-eval aggregates."""
    return dict.fromkeys(METRICS, Scored(doc["probe"], *results[0]))
