"""The status of the cells of a grid, read from their run directories alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite.cells import Cell, display_name, variants
from suite.grids import Grid
from suite.launch.provenance import stale_because_of
from suite.launch.scorer import missing_evals
from suite.records import DamagedRecord, Records, RunDir, run_dir

DAMAGED = "damaged records"
"""The note of a run with a record file that cannot be read."""
MAX_LISTED = 500
"""A table of more cells than this omits those that are done."""


@dataclass(frozen=True)
class CellStatus:
    """The status of one cell of a grid.

    `note` adds what the state does not show, such as interrupted or stale. `is_finished` is the result of
    `suite.launch.scorer.is_finished`, and not part of the JSON object.
    """

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
    is_finished: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        fields = asdict(self)
        del fields["is_finished"]
        return fields


def cell_status(results: Path, cell: Cell) -> CellStatus:
    """Return the status of a cell.

    A run whose state is running while its lock is free was interrupted: it is pending. A run with a damaged record file
    is failed: it is not continued until the user has repaired the file.
    """
    run = run_dir(results, cell)
    try:
        records = run.read_all()
    except DamagedRecord as error:
        return _damaged_status(run, str(error))
    return _status(run, cell, records)


def _damaged_status(run: RunDir, damage: str) -> CellStatus:
    return CellStatus(
        cell=run.name.rpartition("-")[2],
        run=run.name,
        state="failed",
        progress=0.0,
        eta_s=None,
        cause=damage,
        note=DAMAGED,
        log=None,
        step=None,
        tokens=None,
        wall_s=None,
        headline=None,
        is_finished=True,
    )


def _status(run: RunDir, cell: Cell, records: Records) -> CellStatus:
    state, note = records.state, None
    if state["state"] == "running":
        state = run.state()  # the run may have ended while the other files were read
    name = state["state"]
    lacks_scores = name == "done" and _lacks_scores(run, cell, records)
    is_finished = name == "failed" or (name == "done" and not lacks_scores)
    alive = run.is_locked()
    if name == "running" and not alive:
        name, note = "pending", "interrupted; resumes from its last checkpoint"
    elif name in ("pending", "done") and alive:
        name = "running"
    elif name == "running" and state.get("trained"):
        note = scoring_line(state)
    elif lacks_scores:
        name, note = "pending", "trained; some scores are missing"
    elif name == "pending" and state.get("cause"):
        note = state["cause"]
    stale = stale_because_of(run, cell, records)
    if stale is not None:
        note = f"stale: {stale}; suite sweep --rerun-stale trains it again"
    last = records.last_line
    return CellStatus(
        cell=run.name.rpartition("-")[2],
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
        headline=headline(records),
        is_finished=is_finished,
    )


def _lacks_scores(run: RunDir, cell: Cell, records: Records) -> bool:
    """Return whether scores are missing; the files of a run are looked for again only if one was not read."""
    was_read = all(config.hash8 in records.evals for config in cell.evaluate)
    return not was_read and bool(missing_evals(run, cell))


def grid_status(results: Path, grid: Grid) -> list[CellStatus]:
    """Return the status of every cell, in the grid's order."""
    return [cell_status(results, cell) for cell in grid.cells]


def status_json(grid: Grid, statuses: Iterable[CellStatus]) -> dict[str, Any]:
    """Return the document that `suite status --json` prints."""
    variant = variants(grid.cells)
    return {"grid": grid.name, "cells": [status.to_json() | {"variant": variant[status.run]} for status in statuses]}


def headline(records: Records) -> str | None:
    """Return the one number of a run for a table: the fraction of bits learned, else bits per byte, else the loss."""
    metrics = {}
    for content in records.evals.values():
        for task, scores in content["tasks"].items():
            metrics.update({(task, name): metric["value"] for name, metric in scores["metrics"].items()})
    if ("bios_storage", "bits") in metrics:
        fraction = metrics["bios_storage", "bits"] / metrics["bios_storage", "bits_max"]
        return f"{fraction:.1%} of bits stored"
    if ("held_out", "bits_per_byte") in metrics:
        return f"{metrics['held_out', 'bits_per_byte']:.4f} bits/byte"
    loss = records.last_line.get("eval_loss", records.last_line.get("loss"))
    return None if loss is None else f"loss {loss:.3f}"


def table(grid: Grid, statuses: list[CellStatus]) -> Table:
    """Return a table of the cells; in a grid of more than `MAX_LISTED` cells, of those that are not done."""
    listed = [status for status in statuses if len(statuses) <= MAX_LISTED or status.state != "done"]
    title = f"{grid.name}: {summary(statuses)}"
    if len(listed) < len(statuses):
        title += " (cells that are done are not listed)"
    rows = Table(title=title, title_justify="left")
    for name in ("run", "state", "done", "steps", "tokens", "training", "headline"):
        rows.add_column(name, justify="right" if name in ("done", "steps", "tokens", "training") else "left")
    variant = variants(grid.cells) if listed else {}
    for status in listed:
        style = {"failed": "red", "done": "green", "running": "cyan"}.get(status.state, "")
        headline_and_note = (status.headline, f"({status.note})" if status.note else None)
        rows.add_row(
            escape(display_name(status.run, variant[status.run])),
            status.state,
            f"{status.progress:.0%}",
            _number(status.step),
            _number(status.tokens),
            duration(status.wall_s),
            " ".join(filter(None, headline_and_note)),
            style=style,
        )
    return rows


def failures(statuses: Iterable[CellStatus]) -> list[str]:
    """Return one line for each failed cell, with its cause and the path of its log."""
    return [
        f"failed: {status.run}: {status.cause}" + (f" (log: {status.log})" if status.log else "")
        for status in statuses
        if status.state == "failed"
    ]


def summary(statuses: list[CellStatus]) -> str:
    """Return counts by state: `3 done, 1 running`."""
    states = [status.state for status in statuses]
    return ", ".join(
        f"{states.count(name)} {name}" for name in ("done", "running", "pending", "failed") if name in states
    )


def scoring_line(state: dict[str, Any]) -> str:
    """Return what a trained run is doing: `scoring`, or for instance `scoring: reads of tables 42%, 1:10 min left`."""
    scoring = state.get("scoring")
    if not scoring:
        return "scoring"
    left = "" if state.get("eta_s") is None else f", {duration(state['eta_s'])} left"
    return f"scoring: {scoring['part']} {scoring['share']:.0%}{left}"


def duration(seconds: float | None) -> str:
    """Return seconds in a readable unit: 42 s, 3:07 min, 2:05 h."""
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
