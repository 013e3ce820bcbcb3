"""What the figures of a grid share: its finished runs, the labels and looks they are drawn with, and footnotes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.comparisons.grid import Comparisons
from analysis.comparisons.statistics import MIN_PAIRS
from analysis.comparisons.steadiness import why_not_compared
from analysis.errors import InputError
from analysis.figures import style
from analysis.records.grid_data import GridData
from analysis.records.regime import regime
from analysis.records.scores import identities

POINT_NOTE = (
    f"Points: mean over seeds, 95 % t-interval for {MIN_PAIRS}+ runs, n in the legend; faint: single runs, or, of "
    "many, their quantiles."
)
SIDE_BY_SIDE = POINT_NOTE.replace("n in the legend", "n at the label")
UNFINISHED = ("pending", "running")
"""States of runs that a sweep finishes."""
LEGEND = 16
"""Most variants that a figure distinguishes."""


class Missing(Exception):
    """A figure that the runs do not allow; the message states the reason and what would make it possible."""


@dataclass(frozen=True)
class Context:
    """The data and looks from which the figures of one grid are drawn.

    Attributes:
        comparisons: The grid's records and comparisons.
        table: The finished runs. `label` is the label under which a run is drawn: that of its variant or, in a grid of
            more than LEGEND variants, its family and table size.
        looks: Label -> how it is drawn.
        drawn_as: Label of a variant -> label under which it is drawn.
        remark: The sentence of footnotes about labels.
    """

    comparisons: Comparisons
    table: pd.DataFrame
    looks: dict[str, style.Look]
    drawn_as: dict[str, str]
    remark: str = ""

    @property
    def data(self) -> GridData:
        """The grid's records."""
        return self.comparisons.data

    @property
    def grid(self) -> str:
        """The grid's name."""
        return self.data.grid

    @property
    def source(self) -> str:
        """The arguments with which `suite sweep` continues the grid."""
        return self.data.source or self.data.grid

    @property
    def notes_on_missing(self) -> list[str]:
        """What holds for all lines of missing figures: which runs they are about, and options that their commands
        need."""
        runs, options = self.data.runs, self.data.baselines
        unfinished = len(self.data.absent) + int(runs["state"].isin(UNFINISHED).sum())
        notes = []
        if unfinished:
            notes.append(
                f"{unfinished} runs of the grid are not finished, and the lines below are about the others; "
                f"suite sweep {self.source} finishes them."
            )
        return [*notes, f"The commands below also need {options}"] if options else notes

    @contextmanager
    def missing_if_refused(self) -> Iterator[None]:
        """Turn an InputError of a comparison into Missing, with the command that continues the grid."""
        try:
            yield
        except InputError as error:
            raise Missing(f"{error}: suite sweep {self.source}") from None

    @cached_property
    def bases(self) -> list[str]:
        """Base sizes, smallest first."""
        return [base for base in self.data.bases if base in set(self.table["base"])]

    def of_base(self, base: str) -> pd.DataFrame:
        """Return the runs of a base size."""
        return self.table[self.table["base"] == base]

    def variants(self, base: str) -> Iterator[tuple[str, pd.DataFrame]]:
        """Return the label and runs of each variant of a base, in reading order."""
        for label, group in self.of_base(base).groupby("label", sort=False):
            yield str(label), group

    def legend(self, label: str) -> str:
        """Return a legend entry: the label and its number of runs, by base where they differ."""
        counts = self.table[self.table["label"] == label].groupby("base").size()
        numbers = [int(counts[base]) for base in self.bases if base in counts.index]
        return f"{label} (n={'/'.join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))})"

    def note(self, text: str, runs: int | None = None) -> str:
        """Return a footnote: what the marks are, the source and its number of runs (those of `table` by default), and
        what the worlds can show."""
        source = f"Source: our runs, grid {self.grid}, {len(self.table) if runs is None else runs} runs."
        return " ".join(filter(None, [text, self.remark, source, regime(self.data.done)]))

    def speed_note(self, text: str) -> str:
        """Return a footnote of a figure with wall-clock times, which states whether they compare variants."""
        return self.note(" ".join(filter(None, [text, why_not_compared(self.data)])))

    @cached_property
    def titles(self) -> pd.DataFrame:
        """One row per score: its identity and its title."""
        return identities(self.data.scores)

    def no_bits(self) -> str:
        """Return why there is no figure of bits learned, and what would make one."""
        if not len(self.table):
            return f"no finished run in grid {self.grid}: suite sweep {self.source}"
        return (
            f"no storage probes at a constant learning rate in grid {self.grid}; they come with bios data, "
            f"train.probes > 0 and train.schedule constant: suite sweep {self.source}"
        )

    def with_bits_at_common_exposure(self, part: pd.DataFrame) -> tuple[pd.DataFrame, float]:
        """Return the runs with storage probes and the last exposure that all of them reached, where `nll` and
        `flops_there` are taken."""
        part = part[part["e50_state"] != "none"]
        exposure, at = self.data.common_exposure(part.index), part.index.to_numpy(int)
        nll = self.data.curves("storage_nll").at(exposure, at)
        return part.assign(nll=nll, flops_there=self.data.curves("train_flops").at(exposure, at)), exposure

    def bases_of_equal_tokens(self) -> list[str]:
        """Return the bases whose finished runs all saw the same number of tokens, within 1 %.

        Raises:
            Missing: There is none.
        """
        tokens = self.table.groupby("base")["tokens"]
        spread = tokens.max() / tokens.min()
        bases = [base for base in self.bases if spread[base] <= 1.01]
        if not bases:
            raise Missing(
                f"runs of grid {self.grid} ended at different numbers of tokens; without train.stop_past they end at "
                f"the same: suite sweep {self.source}"
            )
        return bases

    def base_sizes(self) -> dict[str, float]:
        """Non-embedding parameters of the reference's plain model of each base; of its smallest model without one."""
        size, base = self.table["params_total"] - self.table["params_embedding"].fillna(0), self.table["base"]
        plain = self.table["family"].eq(self.data.reference) & ~self.table["reshaped"]
        smallest = size.groupby(base).min().to_dict() | size[plain].groupby(base[plain]).min().to_dict()
        return {str(name): float(value) for name, value in smallest.items()}


def context(comparisons: Comparisons) -> Context:
    """Return the figures' view of a grid's finished runs."""
    data = comparisons.data
    table = data.done
    remark = ""
    if table["label"].nunique() > LEGEND and len(data.smaller_tables):
        table = table[~table.index.isin(data.smaller_tables["run"])]
        remark = "Runs with smaller tables are drawn in the figure of table bytes only. "
    if table["label"].nunique() > LEGEND and table["control"].notna().any():
        table = table[table["control"].isna()]
        remark += "Controls are drawn in their own figure only. "
    labels = table["label"]
    if labels.nunique() > LEGEND:
        labels = _pooled(table)
        remark += f"The grid has {table['label'].nunique():,} variants: those of one family and table size are pooled."
    drawn = labels.drop_duplicates()[:LEGEND]
    if labels.nunique() > LEGEND:
        remark += f" {labels.nunique() - LEGEND} of {labels.nunique()} families and sizes are not drawn."
    drawn_as = dict(zip(table["label"], labels, strict=True))
    table = table.assign(label=labels)
    table = table[table["label"].isin(drawn)]
    pairs = table.drop_duplicates("label")
    looks = style.looks(list(zip(pairs["family"], pairs["label"], strict=True)))
    return Context(comparisons, table, looks, drawn_as, remark.strip())


def _pooled(table: pd.DataFrame) -> pd.Series:
    """Return the family and table size, or width, of each run."""
    keys = np.where(table["half_keys"].notna(), " k" + table["half_keys"].fillna(0).astype(int).astype(str), "")
    width = np.where(table["ffn_hidden"].notna(), " ffn" + table["ffn_hidden"].fillna(0).astype(int).astype(str), "")
    return table["family"] + keys + width
