"""What the `bios` worlds of some runs can show: learning speed, or capacity."""

from __future__ import annotations

import pandas as pd

BITS_PER_PERSON = 39.6116
"""Entropy of a person's attributes in a `bios` world: the sum of log2 of 200, 100, 50, 300, 100 and 28 values."""
BITS_PER_PARAMETER = 2.0
"""What a dense model can store, roughly (Allen-Zhu and Li, Physics of Language Models part 3.3)."""
AFTER_100_EXPOSURES = 1.0
"""What it has stored after 100 exposures, in bits per parameter (same source)."""


def regime(runs: pd.DataFrame) -> str:
    """Return one sentence on what the worlds of these runs can show; empty without any."""
    worlds = runs[runs["people"].notna() & runs["params_total"].gt(0)]
    if worlds.empty:
        return ""
    density = worlds["people"].astype(float) * BITS_PER_PERSON / worlds["params_total"]
    if density.max() < BITS_PER_PARAMETER:
        return "Worlds hold fewer bits than the dense model could store: this measures learning speed, not capacity."
    low, high = f"{density.min():.2g}", f"{density.max():.2g}"
    span = low if low == high else f"{low} to {high}"
    return f"Worlds hold {span} bits per parameter (a dense model stores about 2)."
