"""Loggers: train.jsonl always, TensorBoard and Weights & Biases on request; they are not part of the identity."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_cells import corpus_of, tiny_cell

from suite.cells import Cell
from suite.errors import UserError
from suite.records import RunDir
from suite.train.loop import Trainer
from suite.train.reporting.loggers import open_loggers, scalars


def train(cell: Cell, cache: Path, folder: Path, stop_at: int | None = None) -> RunDir:
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    trainer = Trainer(cell, corpus_of(cell, cache), run)
    trainer.run_to_end(lambda: trainer.step == stop_at)
    return run


def expected(run: RunDir) -> dict[tuple[str, int], float]:
    """Return the numbers of train.jsonl by path and step."""
    return {(name, line["step"]): value for line in run.train_lines() for name, value in scalars(line).items()}


def test_scalars_are_named_by_their_path() -> None:
    record = {"loss": 1.5, "value_lr": None, "probe": {"storage": {"bits": 2}}, "usage": {"tables": [{"used": 0.5}]}}
    assert scalars(record) == {"loss": 1.5, "probe/storage/bits": 2, "usage/tables/0/used": 0.5}


def test_loggers_change_neither_hash_nor_losses_and_are_off_by_default(cache: Path, tmp_path: Path) -> None:
    assert tiny_cell(loggers=["tensorboard", "wandb"]).hash8 == tiny_cell().hash8
    run = train(tiny_cell(), cache, tmp_path / "run")
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "train.jsonl", "state.json"}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=rf"train\.loggers: {name} .*next-parameter\[{name}\]"):
        open_loggers(RunDir(tmp_path), tiny_cell(loggers=[name]), 0)


@pytest.mark.slow
def test_tensorboard_has_the_scalars_of_train_jsonl_once_after_a_resume(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cell = tiny_cell("memory_plus", loggers=["tensorboard"], probes=2)
    run = train(cell, cache, tmp_path / "run", stop_at=6)
    checkpoint = run.checkpoints / "step-6"
    checkpoint.rename(tmp_path / "lost")  # the run resumes from step 4 and logs steps 5 and 6 again
    train(cell, cache, run.path)
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    logged = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, len(events.Scalars("loss")) + 1))
    assert logged == pytest.approx(expected(run), rel=1e-6)


@pytest.mark.slow
def test_wandb_has_the_scalars_of_train_jsonl(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(tiny_cell("pkm", loggers=["wandb"], probes=2), cache, tmp_path / "run")
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    records: list[Any] = []
    while not (records and records[-1].HasField("exit")):  # wandb's own process writes the file
        assert time.monotonic() < deadline
        records = [Record.FromString(data) for data in wandb_records(file.read_bytes())]
    logged: dict[tuple[str, int], float] = {}
    for record in records:
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        logged |= {(key, row["step"]): value for key, value in row.items() if not key.startswith("_")}
    assert logged == pytest.approx(expected(run), rel=1e-12)


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of an offline run's file: LevelDB's log format in blocks of 32 KiB after a 7-byte header."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (padding := -position % 32768) and padding < 7:
            position += padding
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""
