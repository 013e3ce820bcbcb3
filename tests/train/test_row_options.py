"""Options of the row-wise optimizer: each trains, resumes bit for bit, and has its documented effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_cells import corpus_of, tiny_cell

from suite.cells import Cell
from suite.errors import UserError
from suite.records import RunDir
from suite.train import checkpoint
from suite.train.loop import Trainer
from suite.train.parallel import Parallel, World

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"value_precision": "bf16"},
    "bf16_master": {"value_precision": "bf16_master"},
    "bf16_stochastic": {"value_precision": "bf16_stochastic"},
    "row": {"value_second_moment": "row"},
    "limit": {"value_replay_limit": 2},
    "lazy": {"value_lazy": True},
    "together": {"value_precision": "bf16_stochastic", "value_second_moment": "row", "value_replay_limit": 3},
}
BYTES_PER_ROW = dict.fromkeys(OPTIONS, 8 * 32 + 9) | {
    "bf16_master": 12 * 32 + 9,
    "row": 4 * 32 + 4 + 9,
    "together": 4 * 32 + 4 + 9,
}
"""Bytes of optimizer state per row, at width 32."""


def cell_of(family: str, **train: Any) -> Cell:
    """Return a cell most of whose rows are read rarely, so that there are steps to replay."""
    cell = tiny_cell(family, epochs=3.0, value_lr=2e-2, checkpoint_every=4, **train)
    model = cell.model.model_dump() | {"half_keys": 24, "top_k": 2}
    return Cell.model_validate(cell.model_dump() | {"model": model})


def trainer_of(cell: Cell, cache: Path, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(cell, corpus_of(cell, cache), RunDir(folder))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunDir(folder).train_lines() if "loss" in line]


def saved(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the tensors of the last checkpoint, with those of the optimizer as `parameter/kind`."""
    state = torch.load(trainer.run.checkpoints / f"step-{trainer.steps}" / checkpoint.STATE_FILE)
    moments = {f"{name}/{kind}": x for name, kinds in state["optimizer"].items() for kind, x in kinds.items()}
    return state["model"] | moments


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_and_resumes_bit_for_bit(name: str, cache: Path, tmp_path: Path) -> None:
    cell = cell_of("peer" if name == "bf16" else "memory_plus", **OPTIONS[name])
    whole = trainer_of(cell, cache, tmp_path / "whole")
    whole.run_to_end()
    table = whole.model.memory_tables()[0]
    assert table.weight.dtype == (torch.bfloat16 if "bf16" in str(OPTIONS[name]) else torch.float32)
    assert whole.optimizer.rows["tables.0.weight"].bytes_per_row == BYTES_PER_ROW[name]
    interrupted = trainer_of(cell, cache, tmp_path / "killed")
    for _ in range(6):
        interrupted.train_step()
        if interrupted.step == 4:
            interrupted.save()
    resumed = trainer_of(cell, cache, tmp_path / "killed")
    assert resumed.step == 4
    resumed.run_to_end()
    uninterrupted = losses(tmp_path / "whole")
    assert losses(tmp_path / "killed") == uninterrupted[4:]
    assert uninterrupted[-1] < uninterrupted[0] - 1
    one, other = saved(whole), saved(resumed)
    assert one.keys() == other.keys()
    assert "tables.0.weight/v" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_master_copy_trains_as_fp32_except_for_rounded_reads(cache: Path, tmp_path: Path) -> None:
    plain = trainer_of(cell_of("pkm"), cache, tmp_path / "fp32")
    master = trainer_of(cell_of("pkm", value_precision="bf16_master"), cache, tmp_path / "master")
    for trainer in (plain, master):
        trainer.run_to_end()
    assert losses(tmp_path / "master") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    (adamw,) = master.optimizer.rows.values()
    assert torch.equal(master.model.memory_tables()[0].weight, adamw.state_dict()["master"].bfloat16())


def test_unread_rows_move_unless_lazy(cache: Path, tmp_path: Path) -> None:
    moved = {}
    for lazy in (True, False):
        trainer = trainer_of(cell_of("pkm", value_lazy=lazy, weight_decay=0.1), cache, tmp_path / str(lazy))
        (table,) = trainer.model.memory_tables()
        before, read = table.weight.detach().clone(), torch.zeros(len(table.weight), dtype=torch.bool)
        table.before_read.append(lambda rows_NS, read=read: read.index_fill_(0, rows_NS.flatten(), True))
        trainer.train_step()
        trainer.optimizer.state()
        assert 0 < read.sum() < len(read)
        moved[lazy] = table.weight.ne(before).any(1)
        assert moved[lazy][read].all()
        assert moved[lazy][~read].any() == (not lazy)


def test_the_replay_limit_reaches_the_optimizer(cache: Path, tmp_path: Path) -> None:
    for limit in (None, 7):
        trainer = trainer_of(cell_of("pkm", value_replay_limit=limit), cache, tmp_path / str(limit))
        assert trainer.optimizer.rows["tables.0.weight"].replay_limit == limit


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"table_optimizer": "dense", "value_precision": "bf16"}, "train.value_precision: got 'bf16', allowed: fp32"),
        ({"table_optimizer": "dense", "value_lazy": True}, "train.value_lazy: got True, allowed: False"),
        ({"value_lazy": True, "value_replay_limit": 3}, "train.value_replay_limit: got 3"),
    ],
)
def test_incompatible_options_are_refused_by_name(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny_cell("pkm", **train)


def test_a_second_moment_per_row_needs_whole_rows(cache: Path) -> None:
    world = World(size=2, parallel=Parallel(memory_parallel=2))
    with pytest.raises(UserError, match=r"parallel\.memory_parallel: got 2"):
        world.check(tiny_cell("pkm", value_second_moment="row"))


def test_options_at_their_default_change_no_hash() -> None:
    assert tiny_cell("pkm").hash8 == tiny_cell("pkm", value_precision="fp32", value_lazy=False).hash8 == HASH
    assert tiny_cell("pkm", value_lazy=True).hash8 != HASH


HASH = "86a553ba"
"""The hash of the cell before the options existed."""
