"""Decay branches: cells that differ only in their token budget share the stable phase of their wsd schedule.

A cell may start from a checkpoint that such a sibling saved before either cell began to decay: training the cell itself
would have reached the same state. Without such a checkpoint the cell trains from the beginning, with the same result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.atomic import sync_folder, write_text
from suite.cells import Cell
from suite.launch.provenance import stale_because
from suite.records import RunDir
from suite.train.checkpoint import steps_saved
from suite.train.checksums import find_damage
from suite.train.schedules import branch_steps, decay_start, steps_of


@dataclass(frozen=True)
class Start:
    """A sibling's checkpoint from which a run may start."""

    run: RunDir
    step: int

    @property
    def checkpoint(self) -> Path:
        """Its folder."""
        return self.run.checkpoints / f"step-{self.step}"


def find_start(run: RunDir, cell: Cell) -> Start | None:
    """Return the latest whole checkpoint of a sibling, in the same results, within the stable phase of `cell`.

    Siblings made by other code, and damaged ones, are skipped.
    """
    if not cell.train.branches:
        return None
    starts: list[Start] = []
    for tokens in cell.train.branches:
        sibling = with_budget(cell, tokens)
        other = RunDir(run.path.with_name(sibling.run_name))
        if tokens == cell.train.tokens or not other.cell_path.exists() or other.damage() is not None:
            continue
        if stale_because(other, sibling) is not None:
            continue
        # Its own record lists the checkpoints it retains: it may have been trained with fewer branches.
        retained = branch_steps(other.read_cell().train, cell.data.seq_len)
        candidates = [Start(other, step) for step in retained if step <= _stable_steps(cell)]
        starts += [start for start in candidates if start.checkpoint.is_dir()]
    latest_first = sorted(starts, key=lambda start: start.step, reverse=True)
    return next((start for start in latest_first if find_damage(start.checkpoint) is None), None)


def begin(run: RunDir, cell: Cell, **facts: Any) -> None:
    """Write the run's cell.json; a run without a checkpoint gets a sibling's, if there is one.

    `branched_from` in cell.json names that sibling. The caller holds the run's lock.
    """
    begun = bool(steps_saved(run))
    start = None if begun else find_start(run, cell)
    record = run.read_record() if begun else {}
    facts |= {name: record[name] for name in ("branched_from", "changes") if name in record}
    if start is not None:
        facts["branched_from"] = {"run": start.run.name, "step": start.step}
    run.write_cell(cell, **facts)
    if start is not None:
        _copy_start(run, start)


def _copy_start(run: RunDir, start: Start) -> None:
    """Copy the lines of train.jsonl up to `start`, then its checkpoint, which is complete or absent.

    Files are hard-linked if the file system allows it, since a checkpoint never changes.
    """
    write_text(run.train_path, start.run.train_path.read_text(encoding="utf-8"))
    run.cut_train(start.step)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = run.checkpoints / f".step-{start.step}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(start.checkpoint, temporary, copy_function=_link_or_copy)
    sync_folder(temporary)
    temporary.rename(run.checkpoints / start.checkpoint.name)
    sync_folder(run.checkpoints)


def must_wait(cell: Cell, run: RunDir, unfinished: Sequence[Cell]) -> bool:
    """Return whether `cell` has to wait for an unfinished cell: its parent, its source, or a sibling.

    A sibling with a smaller budget will save a checkpoint from which `cell` can start. Without waiting, cells that
    start together would each train their common phase.

    Args:
        cell: The cell.
        run: Its run.
        unfinished: The unfinished cells of the sweep.
    """
    needed = {cell.train.parent, None if cell.source is None else cell.source.hash8}
    if any(other.hash8 in needed for other in unfinished):
        return True
    if not cell.train.branches:
        return False
    for other in unfinished:
        if other.train.branches and (other.train.tokens or 0) < (cell.train.tokens or 0):
            other_run = RunDir(run.path.with_name(other.run_name))
            if with_budget(cell, other.train.tokens) == _comparable(other, cell) and not _is_past(other_run, other):
                return True
    return False


def with_budget(cell: Cell, tokens: int | None) -> Cell:
    """Return the cell with another number of training tokens."""
    return cell.model_copy(update={"train": cell.train.model_copy(update={"tokens": tokens})})


def _comparable(other: Cell, cell: Cell) -> Cell:
    """Return the other cell, with the branches and evaluations of `cell`, which do not affect weights."""
    train = other.train.model_copy(update={"branches": cell.train.branches})
    return other.model_copy(update={"train": train, "evaluate": cell.evaluate})


def _is_past(run: RunDir, cell: Cell) -> bool:
    """Return whether the run has saved the end of its stable phase, or has no stable phase."""
    stable = _stable_steps(cell)
    return stable <= 0 or (run.checkpoints / f"step-{stable}").is_dir()


def _stable_steps(cell: Cell) -> int:
    assert cell.train.tokens is not None, "cells require tokens with branches"
    return decay_start(cell.train, steps_of(cell.train, cell.train.tokens, cell.data.seq_len))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
