"""Learning and forgetting while new facts are taught, from the measurements in train.jsonl (docs/new-facts.md).

Values are means over the facts taught so far. Bits of a fact are 0 for a model that knows only the possible answers,
negative for one that is sure of a wrong one, and at most `bits_max`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

KINDS = ("storage", "paraphrase", "extraction")
"""Templates that were taught, unseen ones, and questions."""
KNOWLEDGE = (
    "taught",
    "bits_max",
    "bits_before",
    *(f"bits_{kind}" for kind in KINDS),
    *(f"recall_{kind}" for kind in KINDS),
    "known_lost",
    "known_recall",
    "bytes_lost",
    "touched",
)
"""Per measurement: facts taught; the most bits of a fact; storage bits before the first fact; bits and recall; the
share of the bits of known people that is lost; their recall; the held-out bits per byte that are added; the share of
table rows updated. None where it does not apply."""
RETENTION = ("later", "gain", "gain_at_first")
"""Per measurement and block of facts that were taught between two measurements: facts taught later, the gain of the
block, and its gain at the first measurement after it."""

Entry = tuple[float | None, ...]


def read_knowledge(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of KNOWLEDGE and of RETENTION for the lines of a run."""
    measured = [line for line in lines if "new" in line]
    if not measured:
        return [], []
    first = measured[0]
    return [_knowledge(first, line) for line in measured], list(_retention(measured))


def _knowledge(first: Mapping[str, Any], line: Mapping[str, Any]) -> Entry:
    new, before, taught = line["new"], first["new"], int(line["new"]["taught"])
    bits, recalls = (
        [_mean(new.get(kind, {}).get(value, [])[:taught]) for kind in KINDS] for value in ("bits", "recall")
    )
    known, known_before = (measurement.get("known", {}) for measurement in (line, first))
    return (
        float(taught),
        _mean(new.get("bits_max", [])[:taught]),
        _mean(before["storage"]["bits"][:taught]),
        *bits,
        *recalls,
        _lost(known, known_before),
        known.get("probe", {}).get("storage", {}).get("recall"),
        known["bits_per_byte"] - known_before["bits_per_byte"] if "bits_per_byte" in known else None,
        _touched(line.get("rows_touched", {})),
    )


def _retention(measured: Sequence[Mapping[str, Any]]) -> Sequence[Entry]:
    ends = [int(line["new"]["taught"]) for line in measured]
    before, entries = measured[0]["new"], []
    for at in range(1, len(measured)):
        start, end = ends[at - 1], ends[at]
        gains = [_gain(line["new"], before, start, end) for line in measured[at:]]
        entries += [(float(later - end), gain, gains[0]) for later, gain in zip(ends[at:], gains, strict=True)]
    return entries


def _gain(new: Mapping[str, Any], before: Mapping[str, Any], start: int, end: int) -> float | None:
    """Return the mean gain in bits of facts [start, end) since the first measurement; None without such facts."""
    pairs = zip(new["storage"]["bits"][start:end], before["storage"]["bits"][start:end], strict=True)
    return _mean([after - earlier for after, earlier in pairs])


def _lost(known: Mapping[str, Any], before: Mapping[str, Any]) -> float | None:
    bits, bits_before = (part.get("probe", {}).get("storage", {}).get("bits") for part in (known, before))
    return None if bits is None or not bits_before else 1 - bits / bits_before


def _touched(rows: Mapping[str, Mapping[str, int]]) -> float | None:
    total = sum(table["rows"] for table in rows.values())
    return sum(table["touched"] for table in rows.values()) / total if total else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None
