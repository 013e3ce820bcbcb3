"""The run directory: atomic files, truncated training lines, and a lock that ends with its process."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from small_disk import small_disk

from suite.atomic import write_json
from suite.errors import DiskFull
from suite.records import Locked, RunDir


def test_content_that_cannot_be_written_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_for_which_there_is_no_space_is_named_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with small_disk(), pytest.raises(DiskFull, match=re.escape(f"{path}: cannot be written: ")) as error:
        write_json(path, {"x": "y" * 30_000})
    assert str(error.value).endswith("free space, and the same command continues")
    assert path.read_text() == '{\n "x": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_line_for_which_there_is_no_space_is_dropped_on_resuming(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append_train({"step": 1})
    with small_disk(), pytest.raises(DiskFull, match=r"train\.jsonl: cannot be written: "):
        run.append_train({"step": 2, "x": "y" * 30_000})
    assert run.train_lines() == [{"step": 1}]
    run.cut_train(2)
    assert run.train_path.read_text() == '{"step": 1}\n'


def test_cut_train_drops_later_steps_and_an_incomplete_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append_train({"step": step})
    with run.train_path.open("a") as file:
        file.write('{"step": 4, "lo')
    run.cut_train(2)
    assert run.train_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_set_state_retains_fields_that_are_not_given(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.state()["state"] == "pending"
    run.set_state("running", started=1.0)
    run.beat(0.5, 3.0)
    run.set_state("failed", cause="NaN")
    state = run.state()
    assert (state["state"], state["cause"], state["started"], state["progress"]) == (
        "failed",
        "NaN",
        1.0,
        0.5,
    )


def hold(folder: Path) -> None:
    with RunDir(folder).lock():
        (folder / "held").touch()
        time.sleep(60)


def test_the_lock_is_exclusive_and_is_released_by_kill_9(tmp_path: Path) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    run = RunDir(tmp_path)
    assert run.is_locked()
    with pytest.raises(Locked), run.lock(patience_s=0.0):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not run.is_locked()
