"""Decay branches: cells that differ in their token budget alone share the stable phase of their wsd schedule.

A cell may start from the checkpoint of such a sibling that was saved before either began to decay: the state is the
one it would have come to by itself. Where there is none, it trains from the beginning; nothing but time depends on
it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.atomic import sync_folder, write_text
from suite.cells import Cell
from suite.launch.provenance import stale_because
from suite.records import RunDir
from suite.train.schedules import branch_steps, decay_start, steps_of


@dataclass(frozen=True)
class Start:
    """A sibling's checkpoint from which a run may go on."""

    run: RunDir
    step: int

    @property
    def checkpoint(self) -> Path:
        """Its folder."""
        return self.run.checkpoints / f"step-{self.step}"


def find_start(run: RunDir, cell: Cell) -> Start | None:
    """The latest kept checkpoint of a sibling of `cell` beside `run` that is of its stable phase, too.

    Siblings made by other code are passed over.
    """
    if not cell.train.branches:
        return None
    found = []
    for tokens in cell.train.branches:
        sibling = with_budget(cell, tokens)
        beside = RunDir(run.path.with_name(sibling.run_name))
        if tokens == cell.train.tokens or not beside.cell_path.exists() or stale_because(beside, sibling) is not None:
            continue
        # What it keeps, its own record says: the budgets it was asked for may be fewer than ours.
        kept = branch_steps(beside.read_cell().train, cell.data.seq_len)
        starts = [Start(beside, step) for step in kept if step <= _stable_steps(cell)]
        found += [start for start in starts if start.checkpoint.is_dir()]
    return max(found, key=lambda start: start.step, default=None)


def begin(run: RunDir, cell: Cell, **facts: Any) -> None:
    """Write the run's cell.json and, if it has no checkpoint yet, give it a sibling's where there is one.

    `branched_from` in cell.json says whose. The caller holds the run's lock.
    """
    begun = any(run.checkpoints.glob("step-*"))
    start = None if begun else find_start(run, cell)
    if start is not None:
        facts["branched_from"] = {"run": start.run.name, "step": start.step}
    elif begun and "branched_from" in (record := run.read_record()):
        facts["branched_from"] = record["branched_from"]
    run.write_cell(cell, **facts)
    if start is not None:
        _go_on_from(run, start)


def _go_on_from(run: RunDir, start: Start) -> None:
    """Make `start` the run's own: its lines of train.jsonl up to there, then its checkpoint, whole or not at all.

    Files are linked where the file system can, since a checkpoint never changes.
    """
    write_text(run.train_path, start.run.train_path.read_text())
    run.cut_train(start.step)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    beside = run.checkpoints / f".step-{start.step}"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(start.checkpoint, beside, copy_function=_link_or_copy)
    sync_folder(beside)
    beside.rename(run.checkpoints / start.checkpoint.name)
    sync_folder(run.checkpoints)


def must_wait(cell: Cell, run: RunDir, unfinished: Iterable[Cell]) -> bool:
    """Whether a sibling of a smaller budget is on its way to a checkpoint from which `cell` could start.

    Without waiting, cells that start together would all train the phase they share.
    """
    if not cell.train.branches:
        return False
    for other in unfinished:
        if other.train.branches and (other.train.tokens or 0) < (cell.train.tokens or 0):
            beside = RunDir(run.path.with_name(other.run_name))
            if with_budget(cell, other.train.tokens) == _as_asked(other, cell) and not _is_past(beside, other):
                return True
    return False


def with_budget(cell: Cell, tokens: int | None) -> Cell:
    """The cell with another number of training tokens."""
    return cell.model_copy(update={"train": cell.train.model_copy(update={"tokens": tokens})})


def _as_asked(other: Cell, cell: Cell) -> Cell:
    """The other cell with what makes no weights as in `cell`."""
    train = other.train.model_copy(update={"branches": cell.train.branches})
    return other.model_copy(update={"train": train, "evaluate": cell.evaluate})


def _is_past(run: RunDir, cell: Cell) -> bool:
    """Whether the run has nothing more to give: its stable phase is saved, or too short to be."""
    stable = _stable_steps(cell)
    return stable <= 0 or (run.checkpoints / f"step-{stable}").is_dir()


def _stable_steps(cell: Cell) -> int:
    assert cell.train.tokens is not None, "cells demands it beside branches"
    return decay_start(cell.train, steps_of(cell.train, cell.train.tokens, cell.data.seq_len))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
