"""What a sweep refuses before it starts a cell: memory, settings and data that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from event_log import EventLog
from tiny_cells import tiny_cell
from tokenizers import Tokenizer, models, pre_tokenizers

from suite.cells import Cell, EvalConfig
from suite.errors import UserError
from suite.grids import Grid
from suite.launch import worker
from suite.launch.checks import memory
from suite.launch.checks.data import refuse_unusable_data
from suite.launch.checks.memory import Launch, MemoryCheck, host_limit
from suite.launch.checks.settings import refuse_unfit_settings
from suite.launch.local import LocalExecutor
from suite.launch.preparation import prepare
from suite.launch.scorer import Scorer
from suite.launch.sweep import Sweep
from suite.plan import one_process
from suite.records import run_dir
from suite.train.parallel import Parallel


def grid_of(*cells: Cell, folder: Path) -> Grid:
    path = folder / "grid.yaml"
    path.touch()
    return Grid("grid", path, cells)


@pytest.mark.parametrize("family", ["dense", "memory_plus"])
def test_a_cell_that_needs_too_much_memory_fails_before_a_process_starts(family: str, tmp_path: Path) -> None:
    cell = tiny_cell(family, batch_rows=1_000_000)
    grid, log = grid_of(cell, folder=tmp_path), EventLog()
    executor = LocalExecutor(grid, tmp_path, Scorer(), slots=1, memory=MemoryCheck(24e9, "this machine"))
    (status,) = Sweep(grid, tmp_path, executor, log).run()
    assert status.state == "failed"
    for part in ("GB of memory", "this machine has 24.0 GB", "train.batch_rows (1000000)"):
        assert part in str(status.cause)
    assert ("model.half_keys (16)" in str(status.cause)) is (family == "memory_plus")
    assert log.events == [f"failed: {cell.run_name}: {status.cause}"]
    assert not (run_dir(tmp_path, cell).path / "logs").exists()


def test_a_tensor_that_cannot_exist_does_not_fit_either() -> None:
    cell = tiny_cell("memory_plus")
    huge = cell.model_copy(update={"model": cell.model.model_copy(update={"half_keys": 10**9})})
    assert "model.half_keys (1000000000)" in str(MemoryCheck(1e12, "this machine").problem(huge))
    assert MemoryCheck(24e9, "this machine").problem(cell) is None


def test_large_batches_are_extrapolated_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = tiny_cell("memory_plus", batch_rows=384)
    extrapolated = one_process.training_bytes(cell, 500, {})
    monkeypatch.setattr(one_process, "TRACED_ROWS", 384)
    assert extrapolated == pytest.approx(one_process.training_bytes(cell, 500, {}), rel=0.02)


def test_tables_in_host_memory_are_compared_with_that_of_the_host() -> None:
    def problem(device: str, host: float) -> str | None:
        cell = tiny_cell("memory_plus", table_device=device)
        large = cell.model_copy(update={"model": cell.model.model_copy(update={"half_keys": 2048})})
        return MemoryCheck(1e9, "a GPU of this machine", host=host).problem(large)

    assert "a GPU of this machine has 1.0 GB; use" in str(problem("model", 64e9))
    assert "train.table_device: host" in str(problem("model", 64e9))
    assert problem("host", 64e9) is None
    assert "train.table_device: got 'host'" in str(problem("host", 1e9))


def test_processes_that_share_a_memory_divide_the_cell() -> None:
    cell = tiny_cell("memory_plus", batch_rows=64)
    tables = cell.model_copy(update={"model": cell.model.model_copy(update={"half_keys": 512})})
    together = Launch(2, Parallel(memory_parallel=2))

    def needed(cell: Cell, shared_by: Launch) -> float:
        bytes_ = MemoryCheck(1e12, "this machine", shared_by=shared_by).needed(cell)
        assert bytes_ is not None
        return bytes_ - shared_by.processes * one_process.PROCESS_BYTES

    alone = needed(tables, Launch())
    assert needed(tables, together) == pytest.approx(alone, rel=0.15), "each process has half of the rows and tables"
    assert needed(tables, Launch(2)) > 1.4 * alone, "each process has whole tables"


def test_a_cell_whose_bytes_cannot_be_counted_needs_more_than_9_billion_gigabytes() -> None:
    cell = tiny_cell("pkm")
    cell = cell.model_copy(update={"model": cell.model.model_copy(update={"half_keys": 2**31})})
    problem = str(MemoryCheck(24e9, "this machine").problem(cell))
    assert problem.startswith("needs more than 9 billion GB of memory, and this machine has 24.0 GB; use ")


@pytest.mark.parametrize("lines", ["0::/job/step\n", "1:cpu:/\n4:memory,hugetlb:/job/step\n"])
def test_the_limit_of_a_container_or_job_counts(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, name = (tmp_path, "memory.max") if lines.startswith("0") else (tmp_path / "memory", "memory.limit_in_bytes")
    (root / "job" / "step").mkdir(parents=True)
    (root / "job" / "step" / name).write_text("max\n" if root == tmp_path else str(2**60))
    (root / "job" / name).write_text("3000000000\n")
    for constant, file, text in (
        ("OWN_CGROUPS", "cgroup", lines),
        ("MEMINFO", "meminfo", "MemTotal:       8000000 kB\nMemFree: 1 kB\n"),
    ):
        (tmp_path / file).write_text(text)
        monkeypatch.setattr(memory, constant, tmp_path / file)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert host_limit() == 3e9
    (root / "job" / name).write_text("9000000000\n")
    assert host_limit() == 8_000_000 * 1024


@pytest.mark.parametrize(
    ("train", "steps", "message"),
    [
        ({"warmup": 6}, 5, "train.warmup: got 6, allowed: at most 5"),
        ({"epochs": None, "tokens": 128 * 4 * 7, "warmup": 8}, None, "train.warmup: got 8, allowed: at most 7"),
        (
            {"epochs": 1e17},
            2**61,
            r"train.epochs: got 1e\+17, which are 2e\+18 steps of 4 rows, allowed: fewer than 2\^63",
        ),
        ({"stop_past": 0.5}, None, "train.stop_past: got 0.5, allowed: null without train.probes"),
    ],
)
def test_settings_that_a_run_cannot_follow_are_named(train: dict[str, Any], steps: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_unfit_settings(tiny_cell(**train), steps)
    refuse_unfit_settings(tiny_cell(warmup=5, probes=2, stop_past=0.5), 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_scores_in_tf32_are_refused_before_training_where_there_is_no_gpu(tmp_path: Path) -> None:
    plain = tiny_cell()
    cell = plain.model_copy(update={"evaluate": (EvalConfig(tasks=("bios_storage",), precision="tf32"),)})
    run = prepare(tmp_path, cell)
    assert worker.run_cell(run.path) == "failed"
    assert "evaluate.precision: got 'tf32'" in run.state()["cause"]
    assert not run.train_lines()


def text_cell(path: Path, **data: Any) -> Cell:
    fields = tiny_cell(epochs=1.0).model_dump()
    content = {"kind": "text", "path": str(path), "seq_len": 32, "tokenizer": {"kind": "bytes"}, **data}
    return Cell.model_validate(fields | {"data": content})


@pytest.mark.parametrize("task", ["held_out", "lambada_openai"])
def test_text_that_the_tokenizer_loses_is_refused_before_training(task: str, tmp_path: Path) -> None:
    library = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b b a\n" * 400)
    (tmp_path / "other.txt").write_text("a b c\n")
    tokenizer = {"kind": "file", "path": str(tmp_path / "tokenizer.json")}
    cell = text_cell(tmp_path / "text.txt", validation=str(tmp_path / "other.txt"), tokenizer=tokenizer)
    path = tmp_path / "data/EleutherAI/lambada_openai/default/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"text": "a b c"}\n')
    run = prepare(tmp_path, cell.model_copy(update={"evaluate": (EvalConfig(tasks=(task,)),)}))
    assert worker.run_cell(run.path, Scorer(tmp_path / "data")) == "failed"
    expected = f"task {task}: data.tokenizer.path: got '{tmp_path}/tokenizer.json', which has no token for 'c' of"
    assert expected in run.state()["cause"]
    assert not run.train_lines()


@pytest.mark.parametrize(
    ("lines", "data", "message"),
    [
        ('{"body": "x"}\n', {}, "data.field 'text': not among the fields, which are body"),
        ('{"text": " "}\n', {}, "which holds no text"),
        ('{"text": "one two three"}\n' * 9, {"tokenizer": {"kind": "bpe", "vocab_size": 200_000}}, "vocab_size"),
    ],
)
def test_a_dry_run_finds_unusable_data(lines: str, data: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    cell = text_cell(path, **data)
    grid = grid_of(cell, folder=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        refuse_unusable_data(grid)
    assert str(caught.value).startswith(f"{grid.source}: cell {cell.run_name}: ")


def test_a_dry_run_compares_the_warm_up_with_the_steps_of_its_corpus(tmp_path: Path) -> None:
    short, long = tiny_cell(warmup=3), tiny_cell(warmup=1000)
    refuse_unusable_data(grid_of(short, folder=tmp_path))
    with pytest.raises(UserError, match=rf"/grid\.yaml: cell {long.run_name}: train\.warmup: got 1000"):
        refuse_unusable_data(grid_of(short, long, folder=tmp_path))
