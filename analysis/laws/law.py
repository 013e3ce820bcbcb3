"""What a law is: its formula as a function of parameters and inputs, and the kinds of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Inputs = Mapping[str, np.ndarray]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    `log`: it is fitted by its logarithm, and 0 is a limit. Otherwise it is fitted as it is, and a finite bound is a
    value that it may take. `linear`: the law is linear in it, so that it is solved for at each start. `start` is the
    range of starts of the others. `at_bound` is what its lower bound means.
    """

    name: str
    meaning: str
    low: float = 0.0
    high: float = math.inf
    log: bool = True
    linear: bool = False
    start: tuple[float, float] = (0.05, 2.0)
    at_bound: str = ""


@dataclass(frozen=True)
class Law:
    """A law y = value(parameters, inputs).

    `residuals`: on the logarithm of y, or on y itself. `size`: what makes a cell large, for hold-out. Inputs may be 0,
    of any sign or constant where the sets state it. `starts`: ranges of starts that depend on the data; `units`: what
    the starts of the parameters in `scales` are multiplied by, at values of the others.
    """

    name: str
    formula: str
    source: str
    inputs: Mapping[str, str]
    output: str
    parameters: tuple[Parameter, ...]
    value: Callable[[Values, Inputs], Any]
    size: Callable[[Inputs], np.ndarray]
    residuals: Literal["log", "linear"] = "log"
    zero_allowed: frozenset[str] = frozenset()
    any_sign: frozenset[str] = frozenset()
    constant_allowed: frozenset[str] = frozenset()
    starts: Callable[[Inputs], dict[str, tuple[float, float]]] = lambda x: {}
    units: Callable[[Values, Inputs], dict[str, np.ndarray]] = lambda values, x: {}
    scales: frozenset[str] = frozenset()
    dense: str | None = None

    @property
    def names(self) -> list[str]:
        """Parameter names, in order."""
        return [parameter.name for parameter in self.parameters]


def offset(name: str = "E", meaning: str = "irreducible loss, nats per token") -> Parameter:
    """Return an additive constant that is not negative."""
    return Parameter(name, meaning, log=False, linear=True, at_bound="the data show no floor")


def coefficient(name: str, meaning: str) -> Parameter:
    """Return a positive factor in which the law is linear."""
    return Parameter(name, meaning, linear=True)


def signed(name: str, meaning: str, linear: bool = False, start: tuple[float, float] = (-1.0, 1.0)) -> Parameter:
    """Return a parameter without bounds, which may be negative.

    Args:
        name: Its name in the law.
        meaning: What it is, with its unit.
        linear: Whether the law is linear in it.
        start: The range that starts are drawn from.
    """
    return Parameter(name, meaning, -math.inf, math.inf, log=False, linear=linear, start=start)


def around(x: np.ndarray, factor: float = 100.0, power: float = 1.0) -> tuple[float, float]:
    """Return the range from a factor below to a factor above a power of the median of the positive values.

    Args:
        x: Values of an input.
        factor: The factor.
        power: The power of the median.
    """
    middle = float(np.exp(power * np.median(np.log(x[x > 0])))) if (x > 0).any() else 1.0
    return middle / factor, middle * factor


def spanned(x: np.ndarray, factor: float = 10.0) -> tuple[float, float]:
    """Return the range from a factor below the least positive value to a factor above the largest."""
    positive = x[x > 0]
    return (float(positive.min()) / factor, float(positive.max()) * factor) if len(positive) else (1.0, 1.0)


def across(x: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the range of a slope: from `low` to `high` over the range of x, per unit of x.

    Args:
        x: Values of an input.
        low: Lowest change over the range of x.
        high: Highest change over the range of x.
    """
    span = float(np.ptp(x))
    return low / span, high / span
