"""A law, its data and its objective, in the coordinates that the solver moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from analysis.fits.solver import Box
from analysis.laws.autodiff import Dual
from analysis.laws.law import Law, Parameter

LOG_STEP = 3.0
FAR = 25.0
"""A parameter on a logarithmic scale may leave its range of starts by this many factors of e: 0 and infinity to any
law, and far from the ends of the floats."""
FARTHEST = 690.0


@dataclass(frozen=True)
class Problem:
    """A law, its data and its objective: weights (n,) multiply the loss of the points; delta infinite: least
    squares."""

    law: Law
    x: Mapping[str, np.ndarray]
    y: np.ndarray
    delta: float = math.inf
    weights: np.ndarray | None = None
    fixed: Mapping[str, float] = field(default_factory=dict)
    least_variance: float = 0.0

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.y)

    @property
    def different(self) -> int:
        """Number of different points: repeated runs of a cell do not test the law's form."""
        return np.unique(np.stack(list(self.x.values())), axis=1).shape[1]

    @property
    def w(self) -> np.ndarray:
        """Weights (n,), ones by default."""
        return np.ones(self.n) if self.weights is None else self.weights

    @property
    def negligible(self) -> float:
        """A difference of objectives that is rounding noise."""
        unit = 1.0 if self.law.residuals == "log" else float(np.abs(self.y).max())
        return 1e-20 * unit**2 * float(self.w.sum())

    @property
    def free(self) -> list[Parameter]:
        """The parameters that are fitted."""
        return [parameter for parameter in self.law.parameters if parameter.name not in self.fixed]

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Range of starts of the free parameters that are not solved for; those with units take it from the data."""
        from_data = self.law.starts(self.x)
        return {p.name: from_data.get(p.name, p.start) for p in self.free if not p.linear}

    @cached_property
    def box(self) -> Box:
        """Bounds of theta and the longest steps."""
        anchored = {name: at for name, at in self.ranges.items() if name not in self.law.scales}
        bounds = [_bounds(p, anchored.get(p.name)) for p in self.free]
        reach = [LOG_STEP if p.log else math.inf if p.linear else _width(self.ranges[p.name]) for p in self.free]
        low, high = np.array(bounds).reshape(-1, 2).T
        return Box(low, high, np.array(reach))

    @cached_property
    def centre(self) -> np.ndarray:
        """Theta (p,) in the middle of the ranges: the law with none of its parameters at a bound."""
        middle = []
        for p, low, high in zip(self.free, self.box.low, self.box.high, strict=True):
            if p.log:
                middle.append(0.5 * (low + high))
            else:
                middle.append(0.5 * sum(self.ranges[p.name]) if p.name in self.ranges else np.abs(self.y).mean())
        return np.array(middle)

    def natural(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parameter values (B,) from theta (B, p), fixed ones included."""
        values = {p.name: to_natural(p, theta[:, i]) for i, p in enumerate(self.free)}
        return values | {name: np.full(len(theta), value) for name, value in self.fixed.items()}

    def predict(self, theta: np.ndarray, x: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the law at inputs x, (B, n)."""
        values = {name: value[:, None] for name, value in self.natural(theta).items()}
        with np.errstate(all="ignore"):
            return np.broadcast_to(self.law.value(values, x), (len(theta), len(next(iter(x.values())))))

    def residual(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals (B, n), law minus data (or their logarithms), and derivatives by theta (B, n, p)."""
        shape = (len(theta), self.n)
        values: dict[str, object] = {name: np.float64(value) for name, value in self.fixed.items()}
        for i, p in enumerate(self.free):
            natural = to_natural(p, theta[:, i : i + 1])
            values[p.name] = Dual(natural, {p.name: natural if p.log else np.ones_like(natural)})
        with np.errstate(all="ignore"):
            result = self.law.value(values, self.x)
            jacobian = np.stack([np.broadcast_to(result.parts.get(p.name, 0.0), shape) for p in self.free], -1)
            value = np.broadcast_to(result.value, shape)
            if self.law.residuals == "linear":
                return value - self.y, jacobian
            return np.log(value) - np.log(self.y), jacobian / value[..., None]

    def restricted(self, rows: np.ndarray) -> Problem:
        """Return the same problem on some of its points."""
        weights = None if self.weights is None else self.weights[rows]
        x = {name: values[rows] for name, values in self.x.items()}
        return Problem(self.law, x, self.y[rows], self.delta, weights, self.fixed, self.least_variance)


def to_natural(parameter: Parameter, theta: np.ndarray) -> np.ndarray:
    """Return a parameter's value from its coordinate."""
    return np.exp(np.clip(theta, -700, 700)) if parameter.log else theta


def to_theta(parameter: Parameter, natural: np.ndarray) -> np.ndarray:
    """Return a parameter's coordinate from its value."""
    return np.log(natural) if parameter.log else natural


def _bounds(parameter: Parameter, starts: tuple[float, float] | None) -> tuple[float, float]:
    """Return the bounds of a coordinate; a bound at 0 or infinity of a logarithmic scale is moved to a finite
    distance."""
    if not parameter.log:
        return parameter.low, parameter.high
    near, far = (-FARTHEST, FARTHEST) if starts is None else (math.log(starts[0]) - FAR, math.log(starts[1]) + FAR)
    low = math.log(parameter.low) if parameter.low > 0 else near
    return low, math.log(parameter.high) if math.isfinite(parameter.high) else far


def _width(starts: tuple[float, float]) -> float:
    return max(starts[1] - starts[0], max(abs(starts[0]), abs(starts[1])) * 0.1)


def lengths(columns: np.ndarray, axis: int) -> np.ndarray:
    """Return Euclidean lengths along an axis, above 0; scaled first, since squares in odd units would leave the
    floats."""
    largest = np.maximum(np.abs(columns).max(axis), 1e-300)
    squares = (columns / np.expand_dims(largest, axis)) ** 2
    return np.maximum(largest * np.sqrt(squares.sum(axis)), 1e-300)
