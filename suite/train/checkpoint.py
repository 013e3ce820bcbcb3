"""Checkpoints: a folder `step-N` that exists only when it is whole; the newest is found by its name.

A folder holds `position.json` (where the run stood) and tensors by name: one `state.pt` where one process trained, the
files of torch.distributed.checkpoint where several did, each having written its part. Either is read by any number of
processes, on any mesh: each takes the parts it holds.
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
"""Tensors, nested by name; DTensors where this process holds a part only."""


def steps_saved(run: RunDir) -> list[int]:
    """The steps of the run's whole checkpoints, ascending."""
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
    """Write checkpoint `step`, keep the newest `keep` and those of the steps `always`; called by all processes.

    The folder is filled under another name, synced and renamed: a kill at any moment leaves the older
    checkpoints as they were, and at most a leftover that the next save removes.
    """
    beside = run.checkpoints / f".step-{step}"
    if world.is_first:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in run.checkpoints.glob(".*"):
            shutil.rmtree(leftover)
        beside.mkdir()
        write_json(beside / POSITION_FILE, position)
    world.wait()
    _write(beside, tensors, world)
    world.wait()
    if world.is_first:
        _publish(run, beside, step, keep, always)
    world.wait()


def _write(folder: Path, tensors: Tensors, world: World) -> None:
    if world.joined:
        # Imported where several processes run: it takes most of two seconds.
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
        return
    with (folder / STATE_FILE).open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(run: RunDir, beside: Path, step: int, keep: int, always: Collection[int]) -> None:
    sync_folder(beside)
    target = _folder(run, step)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)
    sync_folder(run.checkpoints)
    for old in steps_saved(run)[:-keep]:
        if old in always:
            continue
        # Renamed first, so that a kill in the middle of the removal leaves no broken step-N.
        doomed = _folder(run, old).rename(run.checkpoints / f".old-{old}")
        shutil.rmtree(doomed)


def restore(run: RunDir, tensors: Tensors) -> dict[str, Any] | None:
    """Fill `tensors` in place from the newest whole checkpoint, and give its position; None where there is none.

    What the checkpoint holds beyond `tensors` is not read. All processes that hold parts call it together.
    """
    steps = steps_saved(run)
    if not steps:
        return None
    folder = _folder(run, steps[-1])
    if (folder / STATE_FILE).exists():
        # Mapped into memory: a process reads the parts it holds, and no more.
        _copy(tensors, torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True))
    else:
        _read_parts(folder, tensors)
    position: dict[str, Any] = json.loads((folder / POSITION_FILE).read_text())
    return position


def _read_parts(folder: Path, tensors: Tensors) -> None:
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
            from suite.train.sharding import copy_part

            copy_part(value, source[name])
        else:
            value.copy_(source[name])


def load_model(run: RunDir, cell: Cell, corpus: Corpus, world: World | None = None) -> Transformer:
    """The run's model with its newest weights, in fp32 and evaluation mode, on the world's device (None: the CPU).

    Whole in this process, or, where processes are joined, divided among them as in training: each reads its part.
    FileNotFoundError where none were saved.
    """
    if world is not None and world.joined:
        from suite.train.sharding import as_parts, build_sharded

        model = build_sharded(cell.model, corpus.vocab_size, cell.seed, world, "fp32")
        state = {"model": as_parts(model, {"model": model.state_dict(), "optimizer": {}})["model"]}
    else:
        model = models.build(cell.model, corpus.vocab_size, cell.seed).to("cpu" if world is None else world.device)
        state = {"model": model.state_dict()}
    if restore(run, state) is None:
        raise FileNotFoundError(f"{run.checkpoints}: no whole checkpoint")
    return model.eval()


def _folder(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step}"
