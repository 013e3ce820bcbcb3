"""Training with tables in host memory: the weights of a table on the device, which never gets the whole table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_cells import corpus_of, tiny_cell
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from suite.cells import Cell
from suite.errors import UserError
from suite.records import RunDir
from suite.train.loop import Trainer
from suite.train.parallel import World

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pkm": ("pkm", {}),
    "peer": ("peer", {}),
    "engram": ("engram", {}),
    "ngram_embedding": ("ngram_embedding", {}),
    "token_table": ("token_table", {}),
    "ultramem_v2": ("ultramem_v2", {}),
    "frozen": ("pkm frozen", {}),
    "shuffled": ("pkm shuffled", {}),
    "memory_plus": ("memory_plus", {"weight_decay": 0.3}),
    "micro-batches": ("memory_plus", {"accumulate": 2, "clip": 0.1}),
    "bf16 products": ("memory_plus", {"precision": "bf16"}),
    "sgd": ("memory_plus", {"table_optimizer": "sgd", "value_lr": 0.5}),
    "lazy": ("memory_plus", {"value_lazy": True}),
    "limit": ("memory_plus", {"value_replay_limit": 2}),
    "bf16": ("peer", {"value_precision": "bf16"}),
    "bf16_master": ("memory_plus", {"value_precision": "bf16_master"}),
    "together": (
        "memory_plus",
        {"value_precision": "bf16_stochastic", "value_second_moment": "row", "value_replay_limit": 3},
    ),
}
RESUMED = ("memory_plus", "engram", "sgd", "together")


def trained(case: str, cache: Path, folder: Path, *devices: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train six steps and return their losses, weights and moments.

    With a second device the process is killed two steps after the checkpoint of step 4, and training resumes there.
    """
    losses: list[float] = []
    for device in devices:
        trainer = trainer_of(cell_of(case, device), cache, folder)
        del losses[trainer.step :]
        while trainer.step < 6:
            loss = trainer.train_step()["loss"]
            assert loss is not None
            losses.append(loss)
            if trainer.step == 4 and device != devices[-1]:
                trainer.save()
    moments = trainer.optimizer.state()
    flat = {f"{name}/{kind}": x for name, kinds in moments.items() for kind, x in kinds.items()}
    return losses, trainer.model.state_dict() | flat


def cell_of(case: str, device: str) -> Cell:
    family, train = CASES[case]
    cell = tiny_cell(family, table_device=device, **train)
    if family != "peer":
        return cell
    model = cell.model.model_dump() | {"half_keys": 16, "top_k": 4}
    return Cell.model_validate(cell.model_dump() | {"model": model})


def trainer_of(cell: Cell, cache: Path, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(cell, corpus_of(cell, cache), RunDir(folder))


@pytest.mark.parametrize("case", CASES)
def test_tables_in_host_memory_train_and_resume_bit_for_bit(case: str, cache: Path, tmp_path: Path) -> None:
    losses, tensors = trained(case, cache, tmp_path / "model", "model")
    devices = ("host", "host") if case in RESUMED else ("host",)
    resumed_losses, resumed = trained(case, cache, tmp_path / "host", *devices)
    assert resumed_losses == losses
    assert resumed.keys() == tensors.keys()
    assert all(torch.equal(resumed[name], tensors[name]) for name in tensors)


def test_a_run_may_change_where_its_tables_are(cache: Path, tmp_path: Path) -> None:
    losses, tensors = trained("memory_plus", cache, tmp_path / "model", "model")
    changed_losses, changed = trained("memory_plus", cache, tmp_path / "changed", "host", "model")
    assert changed_losses == losses
    assert all(torch.equal(changed[name], tensors[name]) for name in tensors)
    cells = [cell_of("memory_plus", device) for device in ("model", "host")]
    assert cells[0].hash8 == cells[1].hash8


class Touched(TorchDispatchMode):
    """Records the operations on the memory of some tensors."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.operations: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(tensor.untyped_storage().data_ptr() in self.storages for tensor in tensors):
            self.operations.add(operation.name().removeprefix("aten::"))
        return result


@pytest.mark.parametrize("family", ["pkm", "memory_plus", "peer", "engram", "ngram_embedding", "token_table"])
def test_forward_and_backward_touch_a_table_only_to_copy_rows(family: str, cache: Path, tmp_path: Path) -> None:
    trainer = trainer_of(cell_of(family, "host"), cache, tmp_path / "run")
    trainer.train_step()
    tables = trainer.model.memory_tables()
    copied = 0
    for table in tables:
        # Replaying steps needs the table too, but belongs to the optimizer; it would hide what a read does.
        assert table.host is not None
        table.host.before_copy.clear()
        original = table.host.copied

        def watched(indices_NS: torch.Tensor, original: Any = original) -> Any:
            nonlocal copied
            readable = original(indices_NS)
            copied += 1
            assert len(readable.rows_XD) == len(indices_NS.unique())
            return readable

        table.host.copied = watched  # type: ignore[method-assign]
    with Touched([table.weight for table in tables]) as touched:
        trainer._backward()
    assert copied >= len(tables)
    assert touched.operations <= {"detach", "index_select"}
    assert "index_select" in touched.operations


def test_what_cannot_be_exact_is_refused_by_name(cache: Path) -> None:
    with pytest.raises(ValidationError, match=r"train\.table_device: got 'host', allowed: model with table_optimizer"):
        tiny_cell("pkm", table_device="host", table_optimizer="dense")
    with pytest.raises(UserError, match=r"train\.table_device: got 'host', allowed: model where several processes"):
        World(size=2, distributed=True).check(tiny_cell("pkm", table_device="host"))
