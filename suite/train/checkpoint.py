"""Checkpoints: folders `step-N`, each complete or absent.

A folder holds `position.json` (the position of the run) and tensors by name: one `state.pt` from a single process, or
the files of torch.distributed.checkpoint, to which each process writes its shards. Any number of processes on any mesh
can read either; each reads the shards that it holds. `checksums.json` lists all files; a checkpoint that differs from
it is passed over for an older one. Other files in the run's `checkpoints` are left alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suite import models
from suite.atomic import FULL, sync_folder, write_json
from suite.cells import Cell
from suite.data.corpus import Corpus
from suite.errors import DiskFull, UserError
from suite.models.transformer import Transformer
from suite.records import RunDir
from suite.train.checksums import find_damage, has_manifest, write_manifest
from suite.train.parallel import World

if TYPE_CHECKING:
    from suite.inference.tables.loading import Place

STATE_FILE = "state.pt"
POSITION_FILE = "position.json"

Tensors = Mapping[str, Any]
"""Tensors, nested by name; DTensors where this process holds a shard."""


def steps_saved(run: RunDir) -> list[int]:
    """Return the steps of the run's complete checkpoints, ascending."""
    paths = [*run.checkpoints.iterdir()] if run.checkpoints.exists() else []
    named = [path for path in paths if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(int(path.name.removeprefix("step-")) for path in named)


def newest_whole(run: RunDir, world: World | None = None) -> int | None:
    """Verify the run's checkpoints, newest first, and return the step of the first that is whole.

    A line on stderr names the damaged ones. All processes call it together.

    Returns:
        The step; None if the run has saved no checkpoint.

    Raises:
        UserError: all checkpoints are damaged.
    """
    world = world or World()
    damaged: list[str] = []
    for step in reversed(steps_saved(run)):
        problem = find_damage(_folder(run, step), world)
        if problem is not None:
            damaged.append(f"step-{step} ({problem})")
            continue
        if damaged and world.is_first:
            print(f"{run.checkpoints}: damaged: {', '.join(damaged)}; using step-{step} instead", file=sys.stderr)
        if world.is_first and not has_manifest(_folder(run, step)):
            print(f"{_folder(run, step)}: has no checksums: an earlier version saved it", file=sys.stderr)
        return step
    if damaged:
        remedy = f"restore a copy, or delete {run.path} and train the cell again"
        raise UserError(f"{run.checkpoints}: no checkpoint is whole: {', '.join(damaged)}; {remedy}")
    return None


def lost_end(run: RunDir, step: int | None) -> int | None:
    """Return the last step of a trained run if its checkpoint is damaged or missing; None if `step` is that step.

    Args:
        run: A run that was trained to its end.
        step: Its newest whole checkpoint, as `newest_whole` returns it.
    """
    last = run.last_train_line().get("step")
    return None if step is None or last is None or step >= last else int(last)


def final_step(run: RunDir, world: World | None = None) -> int | None:
    """Return the step whose weights are the run's: of a trained run the last, of another that of its newest checkpoint.

    All processes call it together.

    Returns:
        The step, whose checkpoint is whole; None if the run has saved no checkpoint.

    Raises:
        UserError: All checkpoints are damaged, or that of a trained run's last step is damaged or missing.
    """
    step = newest_whole(run, world)
    if run.state().get("trained") and (last := lost_end(run, step)) is not None:
        raise UserError(
            f"{run.checkpoints}: the checkpoint of the last step, {last}, is damaged or missing; suite train "
            f"{run.cell_path} trains from step {step} to the end again"
        )
    return step


def save(
    run: RunDir,
    step: int,
    tensors: Tensors,
    position: dict[str, Any],
    keep: int,
    world: World,
    always: Collection[int] = (),
) -> None:
    """Write a checkpoint and remove old ones. All processes call it together.

    The folder is written under a temporary name, synced and renamed. A kill at any moment leaves older checkpoints
    intact and at most a temporary folder, which the next save removes.

    Args:
        run: the run directory.
        step: number of steps taken.
        tensors: model and optimizer tensors by name.
        position: content of position.json.
        keep: number of most recent checkpoints to retain.
        world: the processes that train together.
        always: steps whose checkpoints are retained in any case.

    Raises:
        UserError: the file system refuses the files; DiskFull if it has no space for them.
    """
    partial = run.checkpoints / f".step-{step}"
    with _agreed_on_refusal(run, step, world):
        if world.is_first:
            _begin(partial, position)
    with _agreed_on_refusal(run, step, world):
        _write(partial, tensors, world)
        write_manifest(partial, world)
    if world.is_first:
        _publish(run, partial, step, keep, always)
    world.wait()


@contextmanager
def _agreed_on_refusal(run: RunDir, step: int, world: World) -> Iterator[None]:
    """Wait for all processes at the end of the block, and raise in all of them if the file system refused one.

    Raises:
        UserError: The file system refuses the files of the checkpoint; DiskFull if it has no space for them.
    """
    refusal: OSError | None = None
    try:
        yield
    except (OSError, RuntimeError, DiskFull) as error:
        cause = error.__context__ if isinstance(error, RuntimeError | DiskFull) else error
        if not isinstance(cause, OSError):  # torch raises a RuntimeError from that of the file system
            raise
        refusal = cause
    refused, full = world.total(refusal is not None, refusal is not None and refusal.errno in FULL)
    if not refused:
        return
    if world.is_first:
        # A full disk then has space for the run's records.
        shutil.rmtree(run.checkpoints / f".step-{step}", ignore_errors=True)
    reason = "another process could not write" if refusal is None else refusal.strerror
    raise (DiskFull if full else UserError)(
        f"{_folder(run, step)}: cannot be written: {reason}; earlier checkpoints are unchanged, and training resumes"
        " from the newest"
    )


def _begin(partial: Path, position: dict[str, Any]) -> None:
    """Remove what earlier saves left, and make the temporary folder with position.json."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial.parent.iterdir():
        if re.fullmatch(r"\.(step|old)-\d+", leftover.name):
            shutil.rmtree(leftover)
    partial.mkdir()
    write_json(partial / POSITION_FILE, position)


def _write(folder: Path, tensors: Tensors, world: World) -> None:
    if world.distributed:
        from suite.train.shard_files import write_shards

        write_shards(folder, tensors)
        return
    with (folder / STATE_FILE).open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(run: RunDir, partial: Path, step: int, keep: int, always: Collection[int]) -> None:
    sync_folder(partial)
    target = _folder(run, step)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    sync_folder(run.checkpoints)
    saved = steps_saved(run)
    passed_over = [old for old in saved if old > step]  # damaged when the run resumed
    earlier = [old for old in saved if old <= step]
    for old in [*passed_over, *(old for old in earlier[:-keep] if old not in always)]:
        # Renamed first, so that a kill during the removal leaves no incomplete step-N.
        removed = _folder(run, old).rename(run.checkpoints / f".old-{old}")
        shutil.rmtree(removed)


def restore(run: RunDir, tensors: Tensors, world: World | None = None) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into `tensors` in place; returns its position, or None if there is none.

    Other tensors of the checkpoint are not read. All processes call it together.

    Raises:
        UserError: all checkpoints are damaged.
    """
    step = newest_whole(run, world)
    if step is None:
        return None
    read(run, step, tensors)
    position: dict[str, Any] = json.loads((_folder(run, step) / POSITION_FILE).read_text(encoding="utf-8"))
    return position


def read(run: RunDir, step: int, tensors: Tensors) -> None:
    """Load a checkpoint into `tensors` in place; other tensors of the checkpoint are not read."""
    folder = _folder(run, step)
    if (folder / STATE_FILE).exists():
        # Memory-mapped, so that a process reads only the shards that it holds.
        _copy(tensors, torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True))
    else:
        _read_shards(folder, tensors)


def _read_shards(folder: Path, tensors: Tensors) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder))


@torch.no_grad()
def _copy(target: Tensors, source: Tensors) -> None:
    for name, value in target.items():
        if isinstance(value, Mapping):
            _copy(value, source[name])
        elif hasattr(value, "device_mesh"):  # a DTensor
            from suite.train.sharding import copy_shard

            copy_shard(value, source[name])
        else:
            value.copy_(source[name])


def load_model(
    run: RunDir,
    cell: Cell,
    corpus: Corpus,
    world: World | None = None,
    step: int | None = None,
    place: Place | None = None,
) -> Transformer:
    """The run's model with saved weights, in fp32 and evaluation mode.

    Args:
        run: the run directory.
        cell: its cell.
        corpus: its prepared data, which gives the vocabulary size.
        world: the processes that share the model, sharded as in training; None: a whole model on the CPU.
        step: the checkpoint, as `newest_whole` returns it; None: the newest that is whole.
        place: where tables stay, in a model that is only evaluated; None: in the model.

    Raises:
        UserError: the run has no whole checkpoint, or its tables cannot be where they are requested.
    """
    step = newest_whole(run, world) if step is None else step
    if step is None:
        raise UserError(
            f"{run.checkpoints}: holds no checkpoint; restore a copy, or delete {run.path} and train the cell again"
        )
    if cell.source is not None or place is not None:
        return _load_stored(run, cell, corpus, world or World(), step, place)
    if world is not None and world.distributed:
        from suite.train.sharding import as_dtensors, build_sharded

        model = build_sharded(cell.model, corpus.vocab_size, cell.seed, world, "fp32", fresh=())
        state = {"model": as_dtensors(model, {"model": model.state_dict(), "optimizer": {}})["model"]}
    else:
        device = torch.device("cpu") if world is None else world.device
        model = models.build(cell.model, corpus.vocab_size, cell.seed, fresh=(), device=device)
        state = {"model": model.state_dict()}
    read(run, step, state)
    return model.eval()


def _load_stored(run: RunDir, cell: Cell, corpus: Corpus, world: World, step: int, place: Place | None) -> Transformer:
    """Load a model whose tables are smaller than those of its source, or elsewhere; see `load_model`."""
    from suite.inference.tables.loading import load_stored  # training does not need it

    path = _folder(run, step) / STATE_FILE
    if world.distributed or not path.exists():
        what = "is loaded" if world.distributed else "was saved"
        raise UserError(
            f"{_folder(run, step)}: {what} by several processes; allowed for its tables: in the model, fp32"
        )
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    model = load_stored(cell.model, corpus.vocab_size, saved, path, cell.quantised, place, cell.kept_rows)
    return model.to(world.device)


def model_shapes(run: RunDir, step: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors in a checkpoint, by name."""
    folder = _folder(run, step)
    if (folder / STATE_FILE).exists():
        tensors = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)["model"]
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    import torch.distributed.checkpoint as dcp

    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in saved.items()
        if name.startswith("model.") and isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step}"
