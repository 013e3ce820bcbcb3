"""Damaged checkpoints are recognised and passed over; what is resumed from an older one is the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parallel_jobs import cell_of, job, run_jobs
from small_disk import small_disk
from tiny_cells import corpus_of, tiny_cell

from suite.data.corpus import prepare
from suite.errors import DiskFull, UserError
from suite.records import RunDir
from suite.train import checkpoint
from suite.train.checksums import MANIFEST, find_damage
from suite.train.loop import Trainer, train
from suite.train.parallel import World

LAST, BEFORE = 8, 4
CELL = tiny_cell("memory_plus", checkpoint_every=4)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: list[Callable[[Path], None]] = [flip_a_byte, truncate, Path.unlink]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was interrupted after its second checkpoint, and the cache of its corpus."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    run = RunDir(folder / "run")
    run.path.mkdir()
    trainer = Trainer(CELL, corpus_of(CELL, folder / "cache"), run)
    assert trainer.run_to_end(lambda: trainer.step == LAST) == "interrupted"
    assert checkpoint.steps_saved(run) == [BEFORE, LAST]
    return run.path, folder / "cache"


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> RunDir:
    shutil.copytree(trained[0], tmp_path / "run")
    return RunDir(tmp_path / "run")


def file_of(run: RunDir, step: int, name: str = checkpoint.STATE_FILE) -> Path:
    return run.checkpoints / f"step-{step}" / name


def outcome(run: RunDir, cache: Path) -> dict[str, torch.Tensor]:
    assert train(CELL, corpus_of(CELL, cache), run) == "done"
    newest = checkpoint.steps_saved(run)[-1]
    state: dict[str, torch.Tensor] = torch.load(file_of(run, newest))["model"]
    return state


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [checkpoint.STATE_FILE, checkpoint.POSITION_FILE])
def test_a_damaged_file_is_named(damage: Callable[[Path], None], name: str, run: RunDir) -> None:
    assert find_damage(file_of(run, LAST).parent) is None
    damage(file_of(run, LAST, name))
    problem = find_damage(file_of(run, LAST).parent)
    assert problem is not None
    assert problem.startswith(f"{name}: ")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_resumes_from_the_older_checkpoint_bit_for_bit(
    damage: Callable[[Path], None],
    run: RunDir,
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run.path, tmp_path / "whole")
    expected = outcome(RunDir(tmp_path / "whole"), trained[1])
    damage(file_of(run, LAST))
    capsys.readouterr()
    resumed = Trainer(CELL, corpus_of(CELL, trained[1]), run)
    assert resumed.step == BEFORE
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert f"step-{LAST} ({checkpoint.STATE_FILE}: " in lines[0]
    assert f"using step-{BEFORE}" in lines[0]
    found = outcome(run, trained[1])
    assert f"{run.name}: training from step {BEFORE}\n" in capsys.readouterr().err
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(find_damage(run.checkpoints / f"step-{step}") is None for step in checkpoint.steps_saved(run))


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(run: RunDir, trained: tuple[Path, Path]) -> None:
    flip_a_byte(file_of(run, LAST))
    every_step = CELL.model_copy(
        update={"train": CELL.train.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 1})}
    )
    trainer = Trainer(every_step, corpus_of(every_step, trained[1]), run)
    trainer.run_to_end(lambda: trainer.step == BEFORE + 1)
    assert checkpoint.steps_saved(run) == [BEFORE + 1]
    assert checkpoint.newest_whole(run) == BEFORE + 1


def test_without_a_whole_checkpoint_the_error_names_all_and_the_remedy(
    run: RunDir, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_byte(file_of(run, LAST))
    truncate(file_of(run, BEFORE))
    with pytest.raises(UserError, match=rf"step-{LAST} .*step-{BEFORE} .*delete") as error:
        checkpoint.load_model(run, CELL, corpus_of(CELL, trained[1]))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"step-{LAST}"):
        Trainer(CELL, corpus_of(CELL, trained[1]), run)
    assert checkpoint.steps_saved(run) == [BEFORE, LAST], "nothing is removed"
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_model(run, CELL, corpus_of(CELL, trained[1]))
    assert capsys.readouterr().err == ""


def test_damaged_weights_are_not_loaded(run: RunDir, trained: tuple[Path, Path]) -> None:
    flip_a_byte(file_of(run, LAST))
    model = checkpoint.load_model(run, CELL, corpus_of(CELL, trained[1]))
    older = torch.load(file_of(run, BEFORE))["model"]
    assert all(torch.equal(value, older[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_an_earlier_version_loads_with_one_line(
    run: RunDir, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (BEFORE, LAST):
        file_of(run, step, MANIFEST).unlink()
    assert Trainer(CELL, corpus_of(CELL, trained[1]), run).step == LAST
    assert [f"step-{LAST}" in line for line in capsys.readouterr().err.splitlines() if "checksums" in line] == [True]
    truncate(file_of(run, LAST))
    assert checkpoint.newest_whole(run) == BEFORE, "zip archives contain checksums of their own"


def test_other_files_in_checkpoints_are_left_alone(run: RunDir, trained: tuple[Path, Path]) -> None:
    others = [
        run.checkpoints / name for name in (".DS_Store", ".hidden/file", "step-copy/state.pt", "step-99", "notes")
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours")
    (file_of(run, LAST).parent / ".DS_Store").write_text("not ours")
    (run.checkpoints / ".step-12").mkdir()
    outcome(run, trained[1])
    assert all(path.read_text() == "not ours" for path in others)
    assert not (run.checkpoints / ".step-12").exists()


def test_a_refused_write_is_one_line_and_leaves_what_was_saved(run: RunDir, trained: tuple[Path, Path]) -> None:
    trainer = Trainer(CELL, corpus_of(CELL, trained[1]), run)
    with small_disk(), pytest.raises(DiskFull, match=f"step-{LAST}: cannot be written: ") as error:
        trainer.save()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-{BEFORE}", f"step-{LAST}"]
    assert checkpoint.newest_whole(run) == LAST


def test_a_refused_write_of_shards_is_one_line(run: RunDir) -> None:
    tensors = {"model": {"weight": torch.ones(100, 100)}}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        world = World(distributed=True)
        with small_disk(), pytest.raises(DiskFull, match="step-12: cannot be written: process 0: File too large"):
            checkpoint.save(run, 12, tensors, {}, 2, world)
    finally:
        torch.distributed.destroy_process_group()
    assert checkpoint.newest_whole(run) == LAST


@pytest.mark.slow
def test_the_shards_of_several_processes_have_checksums(cache: Path, tmp_path: Path) -> None:
    cell = cell_of("memory_plus", 4, checkpoint_every=2)
    corpus = prepare(cell.data, cache)
    run = RunDir(tmp_path / "run")
    run_jobs([job(cell, run.path, memory_parallel=2, dtype="float32", stop_at=2)], cache, 2, tmp_path)
    run_jobs([job(cell, run.path, memory_parallel=2, dtype="float32")], cache, 2, tmp_path)
    assert checkpoint.steps_saved(run) == [2, 4]
    folder = run.checkpoints / "step-4"
    files = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(json.loads((folder / MANIFEST).read_text())) == files
    assert {name for name in files if name.startswith("__")} >= {"__0_0.distcp", "__1_0.distcp"}
    whole = checkpoint.load_model(run, cell, corpus).state_dict()
    flip_a_byte(folder / "__1_0.distcp")
    assert checkpoint.newest_whole(run) == 2
    # Two processes agree on the older one, train the two steps again and replace the damaged checkpoint.
    run_jobs([job(cell, run.path, memory_parallel=2, dtype="float32")], cache, 2, tmp_path)
    assert find_damage(folder) is None
    again = checkpoint.load_model(run, cell, corpus).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
