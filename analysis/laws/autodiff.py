"""Exact derivatives of a formula by forward accumulation: a value and its partial derivatives by parameter.

A law is written once, as its formula; evaluated on `Dual` parameters it gives its analytic gradient, on plain
arrays its value alone. Arrays broadcast: parameters (B, 1) for B fits at once, data (n,), results (B, n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


class Dual:
    """A value with partial derivatives; supports the arithmetic that laws need."""

    __slots__ = ("parts", "value")
    __array_ufunc__ = None  # numpy arrays on the left leave the operation to this class

    def __init__(self, value: Array, parts: dict[str, Array]) -> None:
        self.value = value
        self.parts = parts

    def _chain(self, value: Array, slope: Array) -> Dual:
        return Dual(value, {name: slope * part for name, part in self.parts.items()})

    def _join(self, other: Dual, value: Array, slope: Any, other_slope: Any) -> Dual:
        parts = {name: slope * part for name, part in self.parts.items()}
        for name, part in other.parts.items():
            parts[name] = parts[name] + other_slope * part if name in parts else other_slope * part
        return Dual(value, parts)

    def __add__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return self._join(other, self.value + other.value, 1.0, 1.0)
        return Dual(self.value + other, self.parts)

    __radd__ = __add__

    def __neg__(self) -> Dual:
        return Dual(-self.value, {name: -part for name, part in self.parts.items()})

    def __sub__(self, other: Any) -> Dual:
        return self + (-other)

    def __rsub__(self, other: Any) -> Dual:
        return -self + other

    def __mul__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return self._join(other, self.value * other.value, other.value, self.value)
        return self._chain(self.value * other, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Dual:
        return self * (other**-1.0 if isinstance(other, Dual) else 1.0 / other)

    def __rtruediv__(self, other: Any) -> Dual:
        return self**-1.0 * other

    def __pow__(self, power: Any) -> Dual:
        if isinstance(power, Dual):
            return exp(power * log(self))
        value = self.value**power
        return self._chain(value, power * self.value ** (power - 1))

    def __rpow__(self, base: Any) -> Dual:
        """Return a constant base to this power, as numpy does; 0 to a positive power is 0 with slope 0."""
        base = np.asarray(base, float)
        positive = base > 0
        logs = np.log(np.where(positive, base, 1.0))
        value = np.exp(self.value * logs)
        if not positive.all():
            value = np.where(positive, value, np.power(base, self.value))
        return self._chain(value, value * logs)


def exp(x: Any) -> Any:
    """Return the exponential of a dual or an array."""
    return x._chain(value := np.exp(x.value), value) if isinstance(x, Dual) else np.exp(x)


def expm1(x: Any) -> Any:
    """Return exp(x) - 1 of a dual or an array, exact where x is tiny."""
    return x._chain(np.expm1(x.value), np.exp(x.value)) if isinstance(x, Dual) else np.expm1(x)


def log(x: Any) -> Any:
    """Return the natural logarithm of a dual or an array."""
    return x._chain(np.log(x.value), 1.0 / x.value) if isinstance(x, Dual) else np.log(x)


def log1p(x: Any) -> Any:
    """Return log(1 + x) of a dual or an array, exact where x is tiny."""
    return x._chain(np.log1p(x.value), 1.0 / (1.0 + x.value)) if isinstance(x, Dual) else np.log1p(x)


def softplus(x: Any) -> Any:
    """Return log(1 + exp(x)) of a dual or an array, finite wherever x is."""
    if not isinstance(x, Dual):
        return np.logaddexp(0.0, x)
    return x._chain(np.logaddexp(0.0, x.value), np.exp(-np.logaddexp(0.0, -x.value)))


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of two duals or arrays, elementwise, with the smaller one's slope."""
    return _choose(x, y, lambda a, b: a <= b)


def maximum(x: Any, y: Any) -> Any:
    """Return the larger of two duals or arrays, elementwise, with the larger one's slope."""
    return _choose(x, y, lambda a, b: a >= b)


def _choose(x: Any, y: Any, first: Callable[[Array, Array], Array]) -> Any:
    a, b = (value.value if isinstance(value, Dual) else np.asarray(value, float) for value in (x, y))
    mask = first(a, b)
    value = np.where(mask, a, b)
    parts: dict[str, Array] = {}
    for operand, taken in ((x, mask), (y, ~mask)):
        for name, part in operand.parts.items() if isinstance(operand, Dual) else ():
            parts[name] = parts.get(name, np.zeros(())) + np.where(taken, part, 0.0)
    return Dual(value, parts) if parts else value
