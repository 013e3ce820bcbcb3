"""Preparing the data of many cells ahead of their training, with progress: what `suite data prepare` does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from suite.cells import BiosData, Cell, DataConfig, HubData, MixtureData, TextData
from suite.data.corpus import Corpus, Part, parts_of, prepare

LINE_EVERY_S = 15.0


def prepare_all(cells: Iterable[Cell], cache: Path, console: Console) -> list[dict[str, Any]]:
    """Prepare every corpus the cells train on, each once; gives what `suite data prepare --json` says of them.

    Progress goes to `console`. A killed call is simply made again: it goes on where the last piece ended.
    Raises UserError for input that cannot be used; what was prepared before stays.
    """
    asked: dict[str, tuple[DataConfig, list[str]]] = {}
    for cell in cells:
        asked.setdefault(cell.data.model_dump_json(), (cell.data, []))[1].append(cell.run_name)
    reports = []
    for config, runs in asked.values():
        for name, part in parts_of(config):
            with _Teller(console, " ".join(filter(None, (name, label(part))))) as teller:
                prepare(part, cache, teller.tell)
        reports.append(_report(prepare(config, cache), runs))
    return reports


def label(config: DataConfig) -> str:
    """A corpus in a few words."""
    if isinstance(config, BiosData):
        return f"bios of {config.people} people, world {config.world}"
    if isinstance(config, HubData):
        return " ".join(filter(None, (config.name, config.subset, config.split)))
    return config.path if isinstance(config, TextData) else f"mixture of {', '.join(sorted(config.parts))}"


def table(reports: list[dict[str, Any]]) -> Table:
    """The reports for people."""
    shown = Table(box=None, pad_edge=False)
    for title in ("data", "part", "tokens", "documents", "held out", "vocabulary", "cells", "commit", "folder"):
        shown.add_column(title, justify="right" if title in ("tokens", "documents", "held out") else "left")
    for report in reports:
        for part in report["parts"]:
            numbers = [f"{part[name]:,}" for name in ("tokens", "documents", "held_out")]
            also = [str(report["vocab_size"]), str(len(report["runs"])), (part["commit"] or "")[:12], part["folder"]]
            shown.add_row(report["label"], part["part"] or "", *numbers, *also)
    return shown


def _report(corpus: Corpus, runs: list[str]) -> dict[str, Any]:
    names = sorted(corpus.config.parts) if isinstance(corpus.config, MixtureData) else [None]
    return {
        "label": label(corpus.config),
        "data": json.loads(corpus.config.model_dump_json()),
        "fingerprint": corpus.fingerprint,
        "vocab_size": corpus.vocab_size,
        "runs": runs,
        "parts": [_part(name, part) for name, part in zip(names, corpus.parts, strict=True)],
    }


def _part(name: str | None, part: Part) -> dict[str, Any]:
    position = part.meta.get("position")
    return {
        "part": name,
        "folder": str(part.folder),
        "tokens": part.tokens,
        "documents": sum(len(r.starts) - 1 for r in part.rounds),
        "held_out": part.meta.get("held_out", 0),
        "content": part.meta.get("content"),
        "commit": position["commit"] if isinstance(position, dict) else None,
    }


class _Teller:
    """Progress of one corpus: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._started = self._told = time.monotonic()
        self._first: int | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None)

    def tell(self, tokens: int, share: float | None) -> None:
        """A Tell."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = tokens, now
        rate = (tokens - self._first) / (now - self._started) if now > self._started else 0.0
        said = f"{self._name}: {tokens / 1e6:,.1f}M tokens, {rate / 1e6:,.2f}M/s"
        self._bar.update(self._task, description=said, total=None if share is None else 1.0, completed=share or 0.0)
        if not self._console.is_terminal and now - self._told >= LINE_EVERY_S:
            self._told = now
            self._line(said if share is None else f"{said}, {share:.0%}")

    def _line(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> _Teller:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None:
            self._line(f"{self._name}: ready")
