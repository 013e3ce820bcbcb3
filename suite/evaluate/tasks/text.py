"""Scoring of whole documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

from suite.evaluate.datasets import Doc


def score_document(doc: Doc, results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return bits and bytes of one document; `results` holds its log-probability in nats."""
    counts = (-results[0] / math.log(2), len(doc["text"].encode()))
    return {"bits_per_byte": counts, "bits_per_byte_se": counts}
