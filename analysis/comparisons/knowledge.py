"""Learning against forgetting: the settings of each method, its hull, and forgetting at equal learning.

A method is a family and a kind of `train.trainable`; its settings are rates, ranks and numbers of rows. Learning is the
share of the missing bits about the new facts that the model gained: 0 before the first fact, 1 if it is certain of all.
Forgetting is the share of the known bits that was lost (for text: the increase of held-out bits per byte). The hull of
a method at one seed is the lower convex hull of its settings and of the untrained parent, (0, 0). Methods are compared
at the learning LEVEL, by seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.comparisons.statistics import Difference, paired
from analysis.records.grid_data import GridData
from analysis.records.runs.labels import flat

METRIC = "forgetting"
"""Metric of a contrast between methods."""
LEVEL = 0.4
"""Learning at which methods are compared (our choice, made on another world than those reported)."""
METHODS = {"all": "full", "lora": "LoRA", "tables": "tables", "rows": "rows", "parameters": "parameters"}


@dataclass(frozen=True)
class Learning:
    """The runs of a grid that were trained on new facts.

    measured: one row per measurement: run (position), family, base, seed, method, label (what distinguishes it among
        the taught runs of its family), and the columns of KNOWLEDGE.
    """

    data: GridData
    measured: pd.DataFrame

    @cached_property
    def final(self) -> pd.DataFrame:
        """The last measurement of each run, with `learned` and `forgotten`."""
        last = self.measured.groupby("run").tail(1)
        lacked = last["bits_max"] - last["bits_before"]
        forgotten = last["known_lost"] if last["known_lost"].notna().any() else last["bytes_lost"]
        return last.assign(learned=(last["bits_storage"] - last["bits_before"]) / lacked, forgotten=forgotten)

    @property
    def forgotten_unit(self) -> str:
        """What forgetting is measured in."""
        shares = self.measured["known_lost"].notna().any()
        return "share of known bits lost" if shares else "held-out bits per byte added"

    def methods(self) -> list[str]:
        """Return the methods in the order of the runs."""
        return list(dict.fromkeys(self.final["method"]))

    def forgetting(self, part: pd.DataFrame) -> pd.Series:
        """Return the forgetting of the settings in `part` at LEVEL, by seed; NaN if no setting learns that much."""
        seeds = {int(str(seed)): forgetting_at(hull_of(group), LEVEL) for seed, group in part.groupby("seed")}
        return pd.Series(seeds, dtype=float)

    def compare(self, treatment: pd.DataFrame, reference: pd.DataFrame) -> Compared:
        """Compare two sets of runs at the level, paired by seed."""
        ours, theirs = (self.forgetting(side) for side in (treatment, reference))
        both = ours.index.intersection(theirs.index)
        differences = (ours[both] - theirs[both]).dropna()
        return Compared(
            paired(differences.to_numpy(float)), len(both), int(ours[both].isna().sum()), int(theirs[both].isna().sum())
        )


@dataclass(frozen=True)
class Compared:
    """Forgetting at equal learning: the difference over the pairs in which both sides reach the level.

    Attributes:
        difference: Treatment less reference.
        pairs: Seeds that both sides have.
        short: Seeds at which the treatment learns less than the level.
        short_reference: Seeds at which the reference learns less than the level.
    """

    difference: Difference
    pairs: int
    short: int
    short_reference: int


def learning_of(data: GridData) -> Learning | None:
    """Return the finished runs of a grid that were taught new facts; None without any."""
    if data.knowledge.empty:
        return None
    measured = data.knowledge[data.knowledge["run"].isin(data.done.index)]
    if measured.empty:
        return None
    taught = data.runs.loc[measured["run"].unique()]
    kinds = [METHODS.get((train.get("trainable") or {}).get("kind", "all"), "full") for train in taught["train"]]
    method = taught["family"] + " " + pd.Series(kinds, index=taught.index)
    named = taught[["family", "base", "seed"]].assign(method=method, label=_settings(taught))
    return Learning(data, measured.reset_index(drop=True).join(named, on="run"))


def _settings(taught: pd.DataFrame) -> pd.Series:
    """Return what distinguishes each run among those of its family that were taught facts, without the method."""
    options = [
        flat({"model": model, "train": train}) for model, train in zip(taught["model"], taught["train"], strict=True)
    ]
    families = list(taught["family"])
    labels = []
    for family, run in zip(families, options, strict=True):
        others = [other for of_family, other in zip(families, options, strict=True) if of_family == family]
        varying = [key for key in sorted(run) if any(repr(other.get(key)) != repr(run[key]) for other in others)]
        shown = [f"{key.rpartition('.')[2]}={run[key]}" for key in varying if run[key] is not None]
        labels.append(" ".join(text for text in shown if not text.startswith("kind=")) or "-")
    return pd.Series(labels, index=taught.index, dtype=object)


def hull_of(settings: pd.DataFrame) -> np.ndarray:
    """Return the hull of rows with `learned` and `forgotten`."""
    return hull(settings[["learned", "forgotten"]].to_numpy(float))


def hull(points: np.ndarray) -> np.ndarray:
    """Return the vertices (n, 2) of the lower convex hull of points and of (0, 0), up to the most learned.

    Args:
        points: Learning and forgetting of each setting, (settings, 2); settings that learn nothing are omitted.
    """
    vertices: list[tuple[float, float]] = []
    for x, y in sorted({(0.0, 0.0), *((float(x), float(y)) for x, y in points if x > 0)}):
        while len(vertices) > 1 and _turn(vertices[-2], vertices[-1], (x, y)) <= 0:
            vertices.pop()
        if not vertices or vertices[-1][0] < x:  # of equal learning, the smaller loss comes first
            vertices.append((x, y))
    return np.array(vertices)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Return twice the area of the triangle, positive for a turn to the left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def forgetting_at(vertices: np.ndarray, level: float) -> float:
    """Return a hull's forgetting at a level of learning; NaN if no setting learns as much."""
    if vertices[-1, 0] < level:
        return float("nan")
    return float(np.interp(level, vertices[:, 0], vertices[:, 1]))
