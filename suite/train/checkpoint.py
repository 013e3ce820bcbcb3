"""Checkpoints: folders `step-N`, each complete or absent.

A folder holds `position.json` (the position of the run) and tensors by name: one `state.pt` from a single process, or
the files of torch.distributed.checkpoint, to which each process writes its shards. Any number of processes on any mesh
can read either; each reads the shards that it holds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from suite import models
from suite.atomic import sync_folder, write_json
from suite.cells import Cell
from suite.data.corpus import Corpus
from suite.models.transformer import Transformer
from suite.records import RunDir
from suite.train.parallel import World

STATE_FILE = "state.pt"
POSITION_FILE = "position.json"

Tensors = Mapping[str, Any]
"""Tensors, nested by name; DTensors where this process holds a shard."""


def steps_saved(run: RunDir) -> list[int]:
    """Steps of the run's complete checkpoints, ascending."""
    names = [path.name for path in run.checkpoints.iterdir()] if run.checkpoints.exists() else []
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))


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
    """
    partial = run.checkpoints / f".step-{step}"
    if world.is_first:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in run.checkpoints.glob(".*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        write_json(partial / POSITION_FILE, position)
    world.wait()
    _write(partial, tensors, world)
    world.wait()
    if world.is_first:
        _publish(run, partial, step, keep, always)
    world.wait()


def _write(folder: Path, tensors: Tensors, world: World) -> None:
    if world.distributed:
        # Imported here because it takes almost two seconds and one process does not need it.
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
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
    for old in steps_saved(run)[:-keep]:
        if old in always:
            continue
        # Renamed first, so that a kill during the removal leaves no incomplete step-N.
        removed = _folder(run, old).rename(run.checkpoints / f".old-{old}")
        shutil.rmtree(removed)


def restore(run: RunDir, tensors: Tensors) -> dict[str, Any] | None:
    """Load the newest complete checkpoint into `tensors` in place; returns its position, or None if there is none.

    Other tensors of the checkpoint are not read. With a sharded model, all processes call it together.
    """
    steps = steps_saved(run)
    if not steps:
        return None
    folder = _folder(run, steps[-1])
    if (folder / STATE_FILE).exists():
        # Memory-mapped, so that a process reads only the shards that it holds.
        _copy(tensors, torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True))
    else:
        _read_shards(folder, tensors)
    position: dict[str, Any] = json.loads((folder / POSITION_FILE).read_text())
    return position


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


def load_model(run: RunDir, cell: Cell, corpus: Corpus, world: World | None = None) -> Transformer:
    """The run's model with its newest weights, in fp32 and evaluation mode.

    Args:
        run: the run directory.
        cell: its cell.
        corpus: its prepared data, which gives the vocabulary size.
        world: the processes that share the model, sharded as in training; None: a whole model on the CPU.

    Raises:
        FileNotFoundError: the run has no complete checkpoint.
    """
    if world is not None and world.distributed:
        from suite.train.sharding import as_dtensors, build_sharded

        model = build_sharded(cell.model, corpus.vocab_size, cell.seed, world, "fp32")
        state = {"model": as_dtensors(model, {"model": model.state_dict(), "optimizer": {}})["model"]}
    else:
        model = models.build(cell.model, corpus.vocab_size, cell.seed).to("cpu" if world is None else world.device)
        state = {"model": model.state_dict()}
    if restore(run, state) is None:
        raise FileNotFoundError(f"{run.checkpoints}: no complete checkpoint")
    return model.eval()


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step}"
