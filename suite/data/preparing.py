"""`suite data prepare`: prepares the data of many cells before they are trained, with progress."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from suite.data.corpus import Corpus, Part, prepare
from suite.data.sources.registry import DataConfig
from suite.errors import UserError

LINE_EVERY_S = 15.0
FILES_SHOWN = 10
COUNTS = ("tokens", "documents", "held_out", "skipped")


def prepare_all(data: Mapping[str, DataConfig], cache: Path, console: Console) -> list[dict[str, Any]]:
    """Prepare every corpus of the runs once. An interrupted call resumes when it is repeated.

    Args:
        data: The `data` block of each run.
        cache: The folder of all prepared corpora.
        console: Receives the progress.

    Returns:
        The reports of `suite data prepare --json`, one per distinct `data` block.

    Raises:
        UserError: The data cannot be read or used; corpora that were prepared earlier remain.
    """
    runs_of: dict[str, list[str]] = {}
    for run, config in data.items():
        runs_of.setdefault(config.model_dump_json(), []).append(run)
    reports = []
    for runs in runs_of.values():
        config = data[runs[0]]
        for name, corpus in config.corpora().items():
            with _ProgressDisplay(console, " ".join(filter(None, (name, corpus.label))), _files(corpus)) as display:
                prepare(corpus, cache, display.update)
        reports.append(_report(prepare(config, cache), runs))
    return reports


def table(reports: list[dict[str, Any]]) -> Table:
    """Return the reports as a table."""
    rendered = Table(box=None, pad_edge=False)
    for title in (
        "data",
        "part",
        "tokens",
        "documents",
        "held out",
        "skipped",
        "vocabulary",
        "cells",
        "commit",
        "folder",
    ):
        rendered.add_column(
            title, justify="right" if title in ("tokens", "documents", "held out", "skipped") else "left"
        )
    for report in reports:
        for part in report["parts"]:
            numbers = [f"{part[name]:,}" for name in COUNTS]
            details = [str(report["vocab_size"]), str(len(report["runs"])), (part["commit"] or "")[:12], part["folder"]]
            rendered.add_row(report["label"], part["part"] or "", *numbers, *details)
    return rendered


def _report(corpus: Corpus, runs: list[str]) -> dict[str, Any]:
    names = corpus.config.corpora()
    return {
        "label": corpus.config.label,
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
        "skipped": part.meta.get("skipped", 0),
        "content": part.meta.get("content"),
        "commit": position["commit"] if isinstance(position, dict) else None,
    }


def _files(corpus: DataConfig) -> list[str]:
    """Return the files of a corpus; empty if they no longer exist, since a prepared corpus does not need them."""
    try:
        return corpus.source_files()
    except UserError:
        return []


class _ProgressDisplay:
    """Progress of one corpus: a bar on a terminal, else a line every LINE_EVERY_S seconds."""

    def __init__(self, console: Console, name: str, files: list[str]) -> None:
        self._console, self._name = console, name
        self._started = self._shown = time.monotonic()
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
        shown = ", ".join(files[:FILES_SHOWN]) + (
            f", and {len(files) - FILES_SHOWN} more" if files[FILES_SHOWN:] else ""
        )
        self._line(f"{name}: preparing" + (f" {len(files)} files: {shown}" if files else ""))

    def update(self, tokens: int, share: float | None, stage: str | None = None) -> None:
        """Show the progress (see `resumable_writer.Progress`); a stage at once."""
        if stage is not None:
            self._bar.update(self._task, description=f"{self._name}: {stage}", total=None)
            self._line(f"{self._name}: {stage}", only_as_text=True)
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = tokens, now
        text = f"{self._name}: {tokens / 1e6:,.1f}M tokens"
        if tokens > self._first:
            text += f", {_rate((tokens - self._first) / (now - self._started))} tokens/s"
        self._bar.update(self._task, description=text, total=None if share is None else 1.0, completed=share or 0.0)
        if now - self._shown >= LINE_EVERY_S:
            self._shown = now
            self._line(text if share is None else f"{text}, {share:.0%}", only_as_text=True)

    def _line(self, text: str, only_as_text: bool = False) -> None:
        """Print a line; `only_as_text`: unless the console is a terminal, which shows a bar."""
        if only_as_text and self._console.is_terminal:
            return
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> _ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None:
            self._line(f"{self._name}: ready")


def _rate(per_s: float) -> str:
    return f"{per_s / 1e6:,.2f}M" if per_s >= 1e6 else f"{per_s / 1e3:,.1f}k"
