"""Learning curves of many runs at once: where they cross a level, and their values at an exposure.

Exposures: in a `bios` world every epoch holds each fact once, so a run's `epoch` counts exposures. Between two probes
a curve is taken to be linear in the logarithm of the exposure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOLERANCE = 1e-9
"""Relative difference of exposures that are still the same."""


@dataclass(frozen=True)
class Curves:
    """Points of one curve per run, (points,) each: run positions, ascending; x, ascending within a run; and y."""

    run: np.ndarray
    x: np.ndarray
    y: np.ndarray
    runs: int
    """How many runs there are, those without a point included."""

    @cached_property
    def first(self) -> np.ndarray:
        """Index of the first point of each run, (runs,)."""
        return np.searchsorted(self.run, np.arange(self.runs), "left")

    @cached_property
    def count(self) -> np.ndarray:
        """Number of points of each run, (runs,)."""
        return np.bincount(self.run, minlength=self.runs)

    def last_x(self) -> np.ndarray:
        """Return the last x of each run, (runs,); NaN without points."""
        return self._of_point(self.x, self.first + self.count - 1)

    def last_y(self) -> np.ndarray:
        """Return the last y of each run, (runs,); NaN without points."""
        return self._of_point(self.y, self.first + self.count - 1)

    def _of_point(self, values: np.ndarray, points: np.ndarray) -> np.ndarray:
        result = np.full(self.runs, np.nan)
        present = self.count > 0
        result[present] = values[points[present]]
        return result

    def crossing(self, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where each curve first reaches its level.

        Args:
            level: (runs,).

        Returns:
            The x of the crossing, (runs,), and its state: `reached`; `censored` where the curve ends below the level
            (x is then its last one, a lower bound); `early` where its first point is above (an upper bound); `none`
            without points. From a first point at x = 0 the curve is linear, since a logarithm has no value there.
        """
        x = self.last_x()
        state = np.where(self.count > 0, "censored", "none").astype(object)
        above = np.flatnonzero(self.y >= level[self.run])
        runs, at = np.unique(self.run[above], return_index=True)
        after = above[at]
        early = after == self.first[runs]
        x[runs[early]], state[runs[early]] = self.x[after[early]], "early"
        runs, after = runs[~early], after[~early]
        low, high = self.x[after - 1], self.x[after]
        share = (level[runs] - self.y[after - 1]) / (self.y[after] - self.y[after - 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            x[runs] = np.where(low > 0, low * (high / low) ** share, low + share * (high - low))
        state[runs] = "reached"
        return x, state

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """All values of x in ascending order, and each point's run and place among them as one sortable number."""
        values, place = np.unique(self.x, return_inverse=True)
        return values, self.run.astype(np.int64) * (len(values) + 1) + place

    def at(
        self, target: np.ndarray | float, run: np.ndarray | None = None, log: bool = True, clamp: bool = False
    ) -> np.ndarray:
        """Return the values of curves at some x.

        Args:
            target: x, one for each of `run` or one for all.
            run: Positions of the runs whose curves are read, (queries,); all runs by default.
            log: Linear in the logarithm of x, points at x = 0 left out; otherwise in x.
            clamp: Beyond its ends a curve has the value of its first or last point; otherwise NaN.

        Returns:
            (queries,); NaN for runs without points or without a target.
        """
        if log and not (self.x > 0).all():
            positive = self.x > 0
            return Curves(self.run[positive], self.x[positive], self.y[positive], self.runs).at(target, run, log, clamp)
        queried = np.arange(self.runs) if run is None else np.asarray(run, int)
        wanted = np.broadcast_to(np.asarray(target, float), queried.shape)
        result = np.full(len(queried), np.nan)
        present = (self.count[queried] > 0) & np.isfinite(wanted)
        queried, wanted = queried[present], wanted[present]
        values, points = self._places
        key = queried.astype(np.int64) * (len(values) + 1) + np.searchsorted(values, wanted, "right")
        after = np.searchsorted(points, key, "left")
        first, last = self.first[queried], self.first[queried] + self.count[queried] - 1
        lower, upper = np.clip(after - 1, first, last), np.clip(after, first, last)
        scale = np.log if log else np.asarray
        x0, x1, x = scale(self.x[lower]), scale(self.x[upper]), scale(wanted)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.clip(np.where(upper > lower, (x - x0) / (x1 - x0), 0.0), 0.0, 1.0)
        answer = self.y[lower] + share * (self.y[upper] - self.y[lower])
        if not clamp:
            before = self.x[first] > wanted * (1 + TOLERANCE)
            answer[before | (wanted > self.x[last] * (1 + TOLERANCE))] = np.nan
        result[present] = answer
        return result
