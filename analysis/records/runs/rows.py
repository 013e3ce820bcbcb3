"""The rows of the frame that runs give: by run, then logged lines in order, then final and intermediate scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.records.columns import Columns, Vocabularies, Vocabulary, missing, values_of
from analysis.records.run_files import AVERAGED
from analysis.records.store import unnest

RUNS = 250
"""Runs whose rows are made at once, so that intermediate arrays stay in the processor's cache."""
PROBED = ("bits", "bits_max", "nll", "recall")
"""Metrics of a probe, in the order of their rows."""
LOGGED = ("step", "tokens", "train_flops", "wall_s", "tokens_per_s")
"""Columns of a logged line."""
WITHIN_A_RUN = (*LOGGED, "split", "task", "metric", "value", "task_version", "few_shot", "n", "stderr", "precision")
"""Columns that differ between the rows of a run."""


class Rows:
    """Makes the columns that differ between the rows of a run."""

    def __init__(self, table: pa.Table, runs: pd.DataFrame, position: np.ndarray, texts: Vocabularies) -> None:
        """Read the lists of a store.

        Args:
            table: The store, with `lines`, `probes` and `scores`.
            runs: The runs.
            position: The position in `runs` of each row of the store, ascending; -1 for the others.
            texts: The vocabularies of the frame.
        """
        scores = unnest(table, "scores", position).rename(columns={"version": "task_version"})
        scores = scores[["run", *(name for name in WITHIN_A_RUN if name in scores)]]
        self._kinds, self._texts = Vocabulary(), texts
        self._lines = values_of(unnest(table, "lines", position), {})
        self._probes = values_of(unnest(table, "probes", position), {"kind": self._kinds})
        self._scores = values_of(scores, {name: own for name, own in texts.items() if name != "run"})
        self._last = values_of(runs[[*LOGGED[1:], "flops_per_token"]], {})
        self._count = len(runs)

    @property
    def runs(self) -> np.ndarray:
        """The positions of the runs that have rows."""
        return np.union1d(self._lines["run"], self._scores["run"])

    def incomplete(self) -> set[str]:
        """Return those of step, tokens and n that some row lacks; logged lines have no n."""
        lines, scores = self._lines, self._scores
        numbers = {
            "step": (lines["step"], scores["step"]),
            "tokens": (lines["tokens"], self._last["tokens"][scores["run"]]),
            "n": (np.full(len(lines["run"]), np.nan), scores["n"]),
        }
        return {name for name, parts in numbers.items() if any(np.isnan(part).any() for part in parts)}

    def parts(self) -> Iterator[Columns]:
        """Yield the rows, RUNS runs at a time; `run` is the position of their run."""
        for first in range(0, self._count, RUNS):
            lists = (self._lines, self._probes, self._scores)
            yield self._rows(*(_between(columns, first, first + RUNS) for columns in lists))

    def _rows(self, lines: Columns, probes: Columns, scores: Columns) -> Columns:
        lines = lines | {"line": _place_in_run(lines["run"])}
        after = lines["line"].max(initial=0) + 1
        parts = [
            self._logged(lines, ("train", "train", "loss"), "loss", "loss", 0),
            self._logged(lines, ("train", "train", "epoch"), "epoch", "loss", 1),
            self._logged(lines, ("probe", "eval", "nll"), "eval_loss", "eval_loss", 2),
            self._logged(lines, ("probe", "eval", "epoch"), "epoch", "eval_loss", 3),
            self._logged(lines, ("averaged", "eval", "nll"), "averaged_eval_loss", "averaged_eval_loss", 4),
            *self._probed(lines, probes),
            self._final(scores, after),
            self._intermediate(scores, after + 1),
        ]
        rows = {name: _joined(parts, name) for name in ("run", "line", "order", *WITHIN_A_RUN)}
        line, order = rows.pop("line"), rows.pop("order")
        place = (rows["run"] * (after + 2) + line) * (order.max(initial=0) + 1) + order
        in_order = np.argsort(place, kind="stable")  # of rows that are mostly sorted; much faster than lexsort
        return {name: values[in_order] for name, values in rows.items()}

    def _logged(self, lines: Columns, named: tuple[str, str, str], field: str, where: str, order: int) -> Columns:
        """Return one row per logged line.

        Args:
            lines: The lines.
            named: Split, task and metric.
            field: Field of the value.
            where: The lines that have this field are taken.
            order: Place among the rows of the line.
        """
        at = np.flatnonzero(~np.isnan(lines[where]))
        return self._of_lines(lines, at, named) | {"value": lines[field][at], "order": np.full(len(at), order)}

    def _of_lines(self, lines: Columns, at: np.ndarray, named: tuple[str, str, str]) -> Columns:
        """Return where some lines were logged, and one split, task and metric for all of them."""
        texts = zip(("split", "task", "metric"), named, strict=True)
        constants = {name: np.full(len(at), self._texts[name].number(text), np.int32) for name, text in texts}
        return {name: lines[name][at] for name in ("run", "line", *LOGGED)} | constants

    def _probed(self, lines: Columns, probes: Columns) -> list[Columns]:
        """Return one row per probe, kind and metric."""
        at = np.searchsorted(lines["run"], probes["run"]) + probes["line"].astype(int)
        order = 5 + len(PROBED) * _place_in_run(probes["run"])
        parts = []
        for kind in self._kinds.texts:
            split = "averaged" if kind.startswith(AVERAGED) else "probe"
            task = f"bios_{kind.removeprefix(AVERAGED)}"
            is_kind = probes["kind"] == self._kinds.number(kind)
            for number, metric in enumerate(PROBED):
                rows = np.flatnonzero(is_kind & ~np.isnan(probes[metric]))
                own = {"value": probes[metric][rows], "n": probes["n"][rows], "order": order[rows] + number}
                parts.append(self._of_lines(lines, at[rows], (split, task, metric)) | own)
        return parts

    def _final(self, scores: Columns, line: int) -> Columns:
        """Return one row per final score, at the run's last values."""
        rows = self._scored(scores, ("final", "table_off"), line)
        return rows | {name: self._last[name][rows["run"]] for name in LOGGED[1:]}

    def _intermediate(self, scores: Columns, line: int) -> Columns:
        """Return one row per score of an intermediate checkpoint."""
        rows = self._scored(scores, ("steps",), line)
        tokens = np.nan_to_num(rows["tokens"])
        per_token = np.nan_to_num(self._last["flops_per_token"][rows["run"]])
        return rows | {"tokens": tokens, "train_flops": tokens * per_token}

    def _scored(self, scores: Columns, splits: Sequence[str], line: int) -> Columns:
        """Return the scores of some splits as rows after all lines of their run, in the files' order."""
        at = np.flatnonzero(np.isin(scores["split"], [self._texts["split"].number(split) for split in splits]))
        place = {"line": np.full(len(at), line), "order": np.arange(len(at))}
        return {name: values[at] for name, values in scores.items()} | place


def _between(columns: Columns, first: int, end: int) -> Columns:
    """Return the entries of the runs from `first` up to `end`."""
    start, stop = np.searchsorted(columns["run"], [first, end])
    return {name: values[start:stop] for name, values in columns.items()}


def _place_in_run(run: np.ndarray) -> np.ndarray:
    """Return the place of each entry among those of its run."""
    return np.arange(len(run)) - np.searchsorted(run, run)


def _joined(parts: Sequence[Columns], name: str) -> np.ndarray:
    """Return a column of all parts, without values where a part lacks it."""
    return np.concatenate([part.get(name, missing(name, len(part["run"]))) for part in parts])
