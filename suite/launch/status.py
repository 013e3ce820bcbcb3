"""How the cells of a grid stand: read from their run directories alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, display_name, variants
from suite.grids import Grid
from suite.launch.provenance import stale_because
from suite.launch.scorer import missing_evals
from suite.records import RunDir, run_dir


@dataclass(frozen=True)
class CellStatus:
    """Where one cell of a grid stands. `note` says what a state alone does not: cut, stale, why it waits."""

    cell: str
    run: str
    state: str
    progress: float
    eta_s: float | None
    cause: str | None
    note: str | None
    log: str | None
    step: int | None
    tokens: int | None
    wall_s: float | None
    headline: str | None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def cell_status(results: Path, cell: Cell) -> CellStatus:
    """The cell's standing; a run that says it is running while nobody holds its lock was cut, and waits."""
    run = run_dir(results, cell)
    state, note = run.state(), None
    name = state["state"]
    alive = run.path.exists() and run.is_locked()
    if name == "running" and not alive:
        name, note = "pending", "cut; resumes from its last checkpoint"
    elif name in ("pending", "done") and alive:
        name = "running"
    elif name == "done" and missing_evals(run, cell):
        name, note = "pending", "trained; some scores are missing"
    elif name == "pending" and state.get("cause"):
        note = state["cause"]
    stale = stale_because(run, cell)
    if stale is not None:
        note = f"stale: {stale}"
    last = _last_line(run)
    return CellStatus(
        cell=cell.hash8,
        run=run.name,
        state=name,
        progress=float(state.get("progress") or 0.0),
        eta_s=state.get("eta_s") if name in ("running", "done") else None,
        cause=state.get("cause") if name == "failed" else None,
        note=note,
        log=state.get("log"),
        step=last.get("step"),
        tokens=last.get("tokens"),
        wall_s=last.get("wall_s"),
        headline=headline(run, last),
    )


def grid_status(results: Path, grid: Grid) -> list[CellStatus]:
    """Every cell's standing, in the grid's order."""
    return [cell_status(results, cell) for cell in grid.cells]


def status_json(grid: Grid, statuses: Iterable[CellStatus]) -> dict[str, Any]:
    """The document `suite status --json` prints."""
    apart = variants(grid.cells)
    return {"grid": grid.name, "cells": [status.to_json() | {"variant": apart[status.run]} for status in statuses]}


def headline(run: RunDir, last: dict[str, Any]) -> str | None:
    """The one number of a run to show in a table: share of bits learned, else bits per byte, else loss."""
    metrics = {}
    for path in sorted((run.path / "eval").glob("*.json")):
        for task, scores in json.loads(path.read_text())["tasks"].items():
            metrics.update({(task, name): metric["value"] for name, metric in scores["metrics"].items()})
    if ("bios_storage", "bits") in metrics:
        share = metrics["bios_storage", "bits"] / metrics["bios_storage", "bits_max"]
        return f"{share:.1%} of bits stored"
    if ("held_out", "bits_per_byte") in metrics:
        return f"{metrics['held_out', 'bits_per_byte']:.4f} bits/byte"
    loss = last.get("eval_loss", last.get("loss"))
    return None if loss is None else f"loss {loss:.3f}"


def _last_line(run: RunDir) -> dict[str, Any]:
    lines = run.train_lines()
    return lines[-1] if lines else {}


def table(grid: Grid, statuses: list[CellStatus]) -> Table:
    """The cells for people."""
    columns = Table(title=f"{grid.name}: {summary(statuses)}", title_justify="left")
    for name in ("run", "state", "done", "steps", "tokens", "training", "headline"):
        columns.add_column(name, justify="right" if name in ("done", "steps", "tokens", "training") else "left")
    apart = variants(grid.cells)
    for status in statuses:
        style = {"failed": "red", "done": "green", "running": "cyan"}.get(status.state, "")
        said = " ".join(filter(None, (status.headline, f"({status.note})" if status.note else None)))
        columns.add_row(
            escape(display_name(status.run, apart[status.run])),
            status.state,
            f"{status.progress:.0%}",
            _number(status.step),
            _number(status.tokens),
            duration(status.wall_s),
            said,
            style=style,
        )
    return columns


def failures(statuses: Iterable[CellStatus]) -> list[str]:
    """One line for every failed cell: its cause and where its log is."""
    return [
        f"failed: {status.run}: {status.cause}" + (f" (log: {status.log})" if status.log else "")
        for status in statuses
        if status.state == "failed"
    ]


def summary(statuses: list[CellStatus]) -> str:
    """Counts by state: `3 done, 1 running`."""
    states = [status.state for status in statuses]
    return ", ".join(
        f"{states.count(name)} {name}" for name in ("done", "running", "pending", "failed") if name in states
    )


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42 s, 3:07 min, 2:05 h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
