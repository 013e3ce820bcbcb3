"""What a user states about the parameters of a formula: bounds, signs, ties and starts, as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.errors import InputError

ALLOWED = (
    "NAME free; NAME > 0; NAME >= 0; 0 <= NAME <= 1; NAME = EXPRESSION; each may end in ~ LOW..HIGH for its starts"
)
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Spec:
    """One parameter: bounds (`low` None: nothing stated), whether the lower one may be reached, tie and starts."""

    low: float | None = None
    high: float = math.inf
    closed: bool = False
    tie: str | None = None
    start: tuple[float, float] | None = None


def specs(text: str | Mapping[str, str]) -> dict[str, Spec]:
    """Return the specifications by parameter, from `E >= 0, k free, beta = alpha` or from a mapping of name to text.

    In a mapping the name is left out of the text, except between two bounds: `E: ">= 0"`, `s: "0 <= s <= 1"`.
    """
    items = [item for item in _split(text) if item.strip()] if isinstance(text, str) else None
    result: dict[str, Spec] = {}
    pairs = [_spec(item) for item in items] if items is not None else []
    if not isinstance(text, str):
        pairs = [
            _spec(value if re.search(rf"\b{re.escape(name)}\b", value.partition("=")[0]) else f"{name} {value}")
            for name, value in text.items()
        ]
    for name, spec in pairs:
        if name in result:
            raise InputError(f"--parameters: {name} is given twice; two bounds are written as 0 <= {name} <= 1")
        result[name] = spec
    return result


def _split(text: str) -> list[str]:
    """Return the parts between commas that stand outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _spec(item: str) -> tuple[str, Spec]:
    body, tilde, starts = item.partition("~")
    start = _range(starts, item) if tilde else None
    body = body.strip()
    if match := re.fullmatch(r"(\w+)(?:\s+free)?", body):
        free = body != match[1]
        if not free and start is None:
            raise InputError(f"--parameters: got {item.strip()!r}, allowed: {ALLOWED}")
        return match[1], Spec(low=-math.inf if free else None, start=start)
    if match := re.fullmatch(rf"({NUMBER})\s*(<=?)\s*(\w+)\s*(<=?)\s*({NUMBER})", body):
        low, high = float(match[1]), float(match[5])
        if not low < high:
            raise InputError(f"--parameters: {item.strip()!r}: the bounds are not in order")
        return match[3], Spec(low, high, closed=match[2] == "<=", start=start)
    if match := re.fullmatch(rf"(\w+)\s*(>=?|<=?)\s*({NUMBER})", body):
        value = float(match[3])
        if match[2].startswith(">"):
            return match[1], Spec(low=value, closed=match[2] == ">=", start=start)
        # below a positive number a parameter is still above 0, as without a bound
        return match[1], Spec(low=None if value > 0 else -math.inf, high=value, start=start)
    if match := re.fullmatch(r"(\w+)\s*=\s*([^=].*)", body):
        return match[1], Spec(tie=match[2])
    raise InputError(f"--parameters: got {item.strip()!r}, allowed: {ALLOWED}")


def _range(text: str, item: str) -> tuple[float, float]:
    match = re.fullmatch(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*", text)
    if match is None or not float(match[1]) < float(match[2]):
        raise InputError(f"--parameters: {item.strip()!r}: allowed after ~: LOW..HIGH")
    return float(match[1]), float(match[2])
