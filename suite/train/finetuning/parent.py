"""Starting a run from the weights of another, its parent.

A cell names its parent by hash (`train.parent`). The parent is a run in the same results folder, or that at the path
`train.init_from`. Tensors that both models have under one name are copied; those that the parent lacks start fresh.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from suite.cells import Cell
from suite.data.corpus import Corpus, prepare
from suite.errors import UserError
from suite.models.sizes import SIZES
from suite.models.transformer import Transformer
from suite.records import RunDir
from suite.train import checkpoint

NAMES_SHOWN = 6


@dataclass(frozen=True)
class Start:
    """What a run starts from: its parent's checkpoint, and where the two models differ.

    Attributes:
        run: The parent.
        step: Its checkpoint.
        shared: Names of the tensors that are copied.
        fresh: Names of those that the parent lacks.
        unused: Names of those that only the parent has.
    """

    run: RunDir
    step: int
    shared: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the start as cell.json records it."""
        record = self.run.read_record()
        return {
            "run": self.run.name,
            "hash": record.get("hash"),
            "step": self.step,
            "code": record.get("versions", {}).get("code"),
            "fresh": list(self.fresh),
            "unused": list(self.unused),
        }

    def line(self) -> str:
        """Return the start in one line."""
        parts = [f"starts from {self.run.name}, step {self.step}"]
        for names, what in ((self.fresh, "fresh"), (self.unused, "not used")):
            if names:
                more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                parts.append(f"{what}: {', '.join(names[:NAMES_SHOWN])}{more}")
        return "; ".join(parts)


def find_parent(run: RunDir, cell: Cell) -> RunDir:
    """Return the run that a cell starts from.

    Args:
        run: The run directory of the cell.
        cell: A cell with a parent.

    Raises:
        UserError: The parent is missing, not trained or made by suite quantise, or the run at the path is another one.
    """
    wanted, init_from = cell.train.parent, cell.train.init_from
    assert wanted is not None, "the cell has a parent"
    assert init_from is not None, "TrainConfig requires it with a parent"
    where = f"train.init_from: got {init_from!r}"
    folders = [Path(init_from)] if (Path(init_from) / "cell.json").is_file() else []
    folders += sorted(run.path.parent.glob(f"*-{wanted}"))
    for folder in folders:
        parent = RunDir(folder)
        if parent.damage() is None and parent.cell_path.exists() and parent.read_cell().hash8 == wanted:
            if not parent.state().get("trained"):
                raise UserError(f"{where}: {parent.path} is not trained to its end; continue it with suite train")
            if (source := parent.read_cell().source) is not None:
                raise UserError(f"{where}, whose tables are made smaller, allowed: its source {source.run_name}")
            return parent
    if folders:
        raise UserError(f"{where}: {folders[0]} is damaged or not the run {wanted}; restore that run")
    raise UserError(f"{where}: the run {wanted} is not in {run.path.parent}; train it there, or give its path")


def corpus_of(parent: RunDir) -> Corpus | None:
    """Return the training data of a parent; None for an imported one."""
    data = parent.read_cell().data
    return prepare(data, parent.path.parent.parent / "cache") if data.has_text else None


def match(run: RunDir, cell: Cell, corpus: Corpus) -> Start:
    """Compare the model of a cell with its parent's last checkpoint.

    Args:
        run: The run directory of the cell.
        cell: A cell with a parent.
        corpus: The prepared data of the cell.

    Raises:
        UserError: The parent cannot be used: see `find_parent`; its last checkpoint is damaged or missing; or its
            shapes, attention or tokenizer are others.
    """
    parent = find_parent(run, cell)
    tokenizer = parent.read_record().get("tokenizer")
    if tokenizer not in (None, corpus.tokenizer.fingerprint):
        raise UserError(
            f"data.tokenizer: differs from that of the parent {parent.path}; use the same data.tokenizer, since the"
            " weights belong to its tokens"
        )
    step = checkpoint.final_step(parent)
    if step is None:
        raise UserError(f"{parent.checkpoints}: holds no checkpoint; restore a copy")
    with torch.device("meta"):
        model = Transformer(cell.model, corpus.vocab_size)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = checkpoint.model_shapes(parent, step)
    shared = tuple(name for name in ours if name in theirs)
    for name in shared:
        if ours[name] != theirs[name]:
            raise UserError(
                f"train.init_from: {parent.path} has {name} of shape {[*theirs[name]]}, this model needs"
                f" {[*ours[name]]}; give both the same model options"
            )
    _refuse_other_attention(parent, cell)
    fresh, unused = (
        tuple(name for name in one if name not in other) for one, other in ((ours, theirs), (theirs, ours))
    )
    return Start(parent, step, shared, fresh, unused)


def _refuse_other_attention(parent: RunDir, cell: Cell) -> None:
    """Raise UserError if the parent's attention computes other values from matrices of equal shapes."""
    ours, theirs = cell.model.size, parent.read_cell().model.size
    if ours.heads != theirs.heads:
        raise UserError(
            f"model.heads: got {ours.heads}, allowed: {theirs.heads}, the attention heads of the parent {parent.path}"
        )
    if ours.rope_theta != theirs.rope_theta:
        bases = ", ".join(name for name, size in SIZES.items() if size.rope_theta == theirs.rope_theta)
        raise UserError(
            f"model.base: got {cell.model.base!r}, whose rotary positions have base {ours.rope_theta:g}, allowed:"
            f" {bases}, with base {theirs.rope_theta:g} as the parent {parent.path}"
        )


def load(start: Start, tensors: Mapping[str, Any]) -> None:
    """Copy the parent's weights into the model's tensors, which are DTensors where they are sharded."""
    checkpoint.read(start.run, start.step, {"model": {name: tensors[name] for name in start.shared}})


def facts(run: RunDir, cell: Cell, corpus: Corpus) -> dict[str, Any]:
    """Return what cell.json records of a run's start; a run that has begun keeps its record.

    Args:
        run: The run directory of the cell.
        cell: The cell.
        corpus: Its prepared data.

    Raises:
        UserError: The parent cannot be used.
    """
    if cell.train.parent is None:
        return {}
    if checkpoint.steps_saved(run):
        record = run.read_record()
        return {"started_from": record["started_from"]} if "started_from" in record else {}
    start = match(run, cell, corpus)
    print(f"{run.name}: {start.line()}", file=sys.stderr)
    return {"started_from": start.document()}
