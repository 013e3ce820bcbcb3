"""What the figures of a grid draw from: finished runs in reading order, their looks, common marks and footnotes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.comparisons.paired import MIN_PAIRS, bits_at, paired
from analysis.figures import style
from analysis.records.runs import Run, regime, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINT_NOTE = f"Points: mean over seeds, 95 % t-interval from {MIN_PAIRS} runs on, n in the legend; faint: single runs."
BESIDE = POINT_NOTE.replace("n in the legend", "n beside")

LEGEND = 16


class Missing(Exception):
    """A figure that these runs do not allow; the message says why and what would make it."""


@dataclass(frozen=True)
class Scene:
    """What every figure of a grid draws from: its finished runs, their table, looks, and the words of the
    footnote. `source`: what `suite sweep` makes the grid's runs from."""

    runs: dict[str, Run]
    table: pd.DataFrame
    looks: dict[str, style.Look]
    grid: str
    source: str
    regime: str
    published: pd.DataFrame | None = None

    @property
    def bases(self) -> list[str]:
        """Base sizes, smallest first."""
        size = self.table.groupby("base")["params_active"].min()
        return [str(base) for base in size.sort_values().index]

    def variants(self, base: str) -> list[tuple[str, list[Run]]]:
        """Label and runs of each variant of a base, dense first, then by family and table size."""
        part = self.table[self.table["base"] == base]
        return [
            (str(label), [self.runs[name] for name in group["run"]])
            for label, group in part.groupby("label", sort=False)
        ]

    def named(self, label: str) -> str:
        """A variant's legend entry: its label and its number of runs, by base where they differ.

        With more variants than a legend can hold (a tuning grid), its family and that family's runs.
        """
        if len(self.looks) > LEGEND:
            family = str(self.table.loc[self.table["label"] == label, "family"].iloc[0])
            return f"{family} (n={int(self.table['family'].eq(family).sum())})"
        counts = self.table[self.table["label"] == label].groupby("base").size()
        found = [int(counts[base]) for base in self.bases if base in counts.index]
        return f"{label} (n={'/'.join(map(str, found if len(set(found)) > 1 else found[:1]))})"

    def note(self, text: str) -> str:
        """The footnote: what the marks are, the source, and what the laptop measures."""
        source = f"Source: our runs, grid {self.grid}, {len(self.runs)} runs."
        return " ".join(filter(None, [text, source, self.regime]))


def scene(runs: list[Run], grid: str, published: pd.DataFrame | None = None, source: str | None = None) -> Scene:
    """The scene of a grid's finished runs, with published numbers to draw beside them."""
    table = summary(runs)
    table = table[table["state"] == "done"]
    table = ordered(table)
    pairs = [(str(family), str(label)) for family, label in zip(table["family"], table["label"], strict=True)]
    kept = {run.name: run for run in runs if run.name in set(table["run"])}
    return Scene(kept, table, style.looks(pairs), grid, source or grid, regime(list(kept.values())), published)


def ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Runs in reading order: bases from small to large, dense first, then families, widths and table sizes."""
    order = {family: rank for rank, family in enumerate(style.COLOURS)}
    size = table.groupby("base")["params_active"].transform("min")
    keys = ["size", "base", "rank", "family", "ffn_hidden", "memory_rows", "label", "seed"]
    table = table.assign(rank=table["family"].map(order).fillna(99), size=size)
    return table.sort_values(keys, na_position="first").drop(columns=["rank", "size"])


def dot(
    axis: Axes,
    at: float,
    values: np.ndarray,
    look: style.Look,
    sideways: bool = False,
    ratio: bool = False,
    **options: Any,
) -> None:
    """The mean of some runs as a marker with its 95 % t-interval (from MIN_PAIRS runs on), single runs as faint ticks.

    `ratio` takes mean and interval of the logarithms.
    """
    found = paired(np.log(values) if ratio else values)
    middle, low, high = ((np.exp(v) if ratio else v) for v in (found.mean, found.low, found.high))
    reach = None if np.isnan(low) else [[middle - low], [high - middle]]
    marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "capsize": 2.5, "linestyle": "none"}
    if sideways:
        axis.plot(values, [at] * len(values), "|", color=look.color, alpha=0.4)
        axis.errorbar([middle], [at], xerr=reach, **(marks | options))
    else:
        axis.plot([at] * len(values), values, "_", color=look.color, alpha=0.4)
        axis.errorbar([at], [middle], yerr=reach, **(marks | options))


def common_exposure(found: Scene, part: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Runs with storage probes, with `nll` and `bits_share` at the last exposure all of them reached, and that
    exposure."""
    known = part[part["e50_state"] != "none"]
    exposure = min(float(found.runs[name].probes["epoch"].iloc[-1]) for name in known["run"])
    runs = [found.runs[name] for name in known["run"]]
    nll = [bits_at(run, exposure, "storage_nll") for run in runs]
    share = [bits_at(run, exposure) / run.bits_max for run in runs]
    flops = [bits_at(run, exposure, "train_flops") for run in runs]
    return known.assign(nll=nll, bits_share=share, flops_there=flops), exposure


def equal_tokens(found: Scene) -> list[str]:
    """Bases whose finished runs all saw the same number of tokens, within 1 %."""
    spread = found.table.groupby("base")["tokens"].agg(lambda tokens: tokens.max() / tokens.min())
    return [base for base in found.bases if spread[base] <= 1.01]


def has_bits(found: Scene) -> bool:
    """Whether any finished run has storage probes at a constant learning rate."""
    return bool(found.table["e50_state"].ne("none").any())


def no_bits(found: Scene) -> str:
    """Why there is no figure of bits learned, and what would make it."""
    return (
        f"no storage probes at a constant learning rate in grid {found.grid}; they come with bios data, "
        f"train.probes > 0 and train.schedule constant: suite sweep {found.source}"
    )


def base_sizes(found: Scene) -> dict[str, float]:
    """Non-embedding parameters of the plain dense model of each base; of its smallest model where there is none."""
    return {base: _base_parameters(found, base) for base in found.bases}


def _base_parameters(found: Scene, base: str) -> float:
    part = found.table[found.table["base"] == base]
    plain = part[part["family"].eq("dense") & ~part["reshaped"]]
    rest = plain if len(plain) else part
    return float((rest["params_total"] - rest["params_embedding"].fillna(0)).min())


def line_of(axis: Axes, found: Scene, label: str, part: pd.DataFrame, x: str, y: str) -> None:
    """One variant over its base sizes: means joined, each with its interval and single runs; x from column `x`."""
    look = found.looks[label]
    groups = sorted(((float(group[x].mean()), group) for _, group in part.groupby("base")), key=lambda item: item[0])
    axis.plot(
        [at for at, _ in groups],
        [group[y].mean() for _, group in groups],
        color=look.color,
        linestyle=look.linestyle,
        marker=look.marker,
        markersize=look.size,
        label=found.named(label),
    )
    for at, group in groups:
        dot(axis, at, group[y].to_numpy(float), look, markerfacecolor=face(look, group, y), markersize=look.size)


def face(look: style.Look, group: pd.DataFrame, key: str) -> str:
    """White where the mean is of E50 and a run is censored, so that it is a bound."""
    return "white" if key == "e50" and bool(group["e50_state"].ne("reached").any()) else look.color


def variant_points(axis: Axes, found: Scene, part: pd.DataFrame, x: str, y: str) -> None:
    """One point per variant; members of a family differ in size and are named beside the point."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for label, group in part.groupby("label", sort=False):
        family, look, at = str(group["family"].iloc[0]), found.looks[str(label)], float(group[x].mean())
        marks: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": look.size}
        axis.plot([], [], label=found.named(str(label)), linestyle="none", **marks)
        beside: dict[str, Any] = {"xytext": (-6, -2), "ha": "right"} if family == "dense" else {"xytext": (6, -2)}
        if np.isfinite(at):
            dot(axis, at, group[y].to_numpy(float), look, markersize=look.size)
            axis.annotate(
                str(label).removeprefix(family).strip(),
                (at, float(group[y].mean())),
                fontsize=6,
                color="#555555",
                textcoords="offset points",
                **beside,
            )
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
