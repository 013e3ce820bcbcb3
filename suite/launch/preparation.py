"""What a sweep refuses, archives and writes before it starts anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite.atomic import write_json
from suite.cells import Cell, flat
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.provenance import stale_because
from suite.records import CELL_FACTS, GRIDS, DamagedRecord, Locked, RunDir, read_json, run_dir
from suite.train.checkpoint import lost_end, newest_whole, steps_saved


def grid_path(results: Path, grid: Grid) -> Path:
    """Return the path of a grid's record, results/grids/<grid>/grid.json."""
    return results / GRIDS / grid.name / "grid.json"


def write_grid(results: Path, grid: Grid) -> None:
    """Write the record of a grid: its file, its runs, and its primary contrast."""
    content = {
        "grid": grid.name,
        "source": str(grid.source),
        "file": str(grid.source.resolve()),
        "arguments": list(grid.arguments),
        "runs": [cell.run_name for cell in grid.cells],
        "contrast": grid.contrast.document() if grid.contrast else None,
    }
    write_json(grid_path(results, grid), content)


def refuse_other_file(path: Path, grid: Grid) -> None:
    """Refuse to replace what another file of the same name recorded.

    A record whose file no longer exists, or has the same content, was made by this grid before it was moved or copied.

    Args:
        path: A record of the grid, with the field `file`.
        grid: The grid.

    Raises:
        UserError: The record belongs to another file.
    """
    try:
        recorded = Path(str(read_json(path, "delete the file").get("file", "")))
    except FileNotFoundError:
        return
    if recorded.is_file() and recorded.read_bytes() != grid.source.read_bytes():
        raise UserError(
            f"{grid.source}: {path} belongs to {recorded}, a grid of the same name; rename one of the files, or use"
            " another --results"
        )


def prepare(results: Path, cell: Cell, event: Callable[[str], None] = lambda text: None) -> RunDir:
    """Write what a worker reads into the cell's run directory.

    Settings outside the cell's identity, such as `train.checkpoint_every`, replace those recorded earlier, and
    cell.json lists such changes. Evaluations that other grids added to the run stay.

    Args:
        results: The results folder.
        cell: The cell.
        event: Called with a line if recorded settings change.

    Returns:
        The run.

    Raises:
        Locked: Another process has the run.
        DamagedRecord: A record of the run is damaged; it is not overwritten.
    """
    run = run_dir(results, cell)
    with run.lock(patience_s=0.2):
        if (damage := run.damage()) is not None:
            raise DamagedRecord(damage)
        facts: dict[str, Any] = {}
        if run.cell_path.exists() and stale_because(run, cell) is None:
            record, recorded = run.read_record(), run.read_cell()
            facts = {name: value for name, value in record.items() if name not in CELL_FACTS}
            if run.state().get("trained"):
                cell = recorded.model_copy(update={"data": cell.data, "evaluate": cell.evaluate})
            cell = cell.model_copy(update={"evaluate": recorded.with_evaluations(cell.evaluate).evaluate})
            if changed := _changes(recorded, cell):
                event(f"changed: {run.name}: {', '.join(f'{field}: {old} -> {new}' for field, old, new in changed)}")
                change = {"step": max(steps_saved(run), default=0), "settings": [*map(list, changed)]}
                facts["changes"] = [*record.get("changes", []), change]
        run.write_cell(cell, **facts)
    return run


def _changes(old: Cell, new: Cell) -> list[tuple[str, Any, Any]]:
    """Return the settings that differ, as (field, old value, new value), without evaluations."""
    before, after = (flat(cell.model_dump(mode="json", exclude={"evaluate"})) for cell in (old, new))
    return [(field, before.get(field), value) for field, value in after.items() if before.get(field) != value]


def refuse_stale(results: Path, cells: Iterable[Cell]) -> None:
    """Raise UserError if runs on disk were made by other code: they are never reused silently."""
    stale = {}
    for cell in cells:
        run = run_dir(results, cell)
        reason = stale_because(run, cell)
        if reason is not None:
            stale[run.path] = reason
    if stale:
        path, reason = next(iter(stale.items()))
        others = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise UserError(
            f"{path}{others} cannot be used ({reason}); train again with --rerun-stale, which moves such runs to "
            f"{results / 'stale'}, or use another --results, or the code that made them"
        )


def archive_stale(results: Path, cells: Iterable[Cell]) -> list[Path]:
    """Move stale runs to results/stale; returns their new places. Raises UserError if one of them is locked."""
    moved = []
    for cell in cells:
        run = run_dir(results, cell)
        if stale_because(run, cell) is None:
            continue
        try:
            with run.lock():
                target = _free_path(results / "stale" / run.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                moved.append(run.path.rename(target))
        except Locked:
            raise UserError(f"{run.path}: is locked by another process; wait for it or stop it") from None
    return moved


def retry_failed(results: Path, cells: Iterable[Cell]) -> None:
    """Make failed runs pending, so that they resume from their last checkpoint; damaged ones are left alone."""
    for cell in cells:
        run = run_dir(results, cell)
        if run.damage() is None and run.state()["state"] == "failed":
            with run.lock():
                run.set_state("pending")


def train_lost_end_again(run: RunDir) -> None:
    """Mark a trained run as not trained, and not done, if its last checkpoint is damaged or missing.

    Training then continues from an older checkpoint, to the same weights. The caller holds the run's lock.

    Args:
        run: The run.

    Raises:
        UserError: All checkpoints are damaged.
    """
    state = run.state()
    if not state.get("trained"):
        return
    step = newest_whole(run)
    if (last := lost_end(run, step)) is not None:
        print(f"{run.name}: the checkpoint of step {last} is lost; training again from step {step}", file=sys.stderr)
        run.set_state("pending" if state["state"] == "done" else state["state"], trained=False)


def _free_path(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3 ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(candidate for candidate in numbered if not candidate.exists())
