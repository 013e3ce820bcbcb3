"""The cache of the run table: a row is used only while the files of its run are unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import write_json, write_run

from analysis.records import store
from analysis.records.run_files import LISTS, SCALARS

COLUMNS = [*SCALARS, *LISTS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(3):
        write_run(tmp_path, "dense", "w32", seed, 9.0)
        write_run(tmp_path, "memory_plus", "w32", seed, 5.0, half_keys=16)
    return tmp_path


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs whose files were read, in order."""
    names: list[str] = []
    read: Callable[[Path], object] = store.read_run

    def counted(path: Path) -> object:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(store, "read_run", counted)
    return names


def fresh(folder: Path) -> pa.Table:
    """The table without any cache."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return store.load(folder, COLUMNS)


def test_unchanged_files_are_not_read_again(folder: Path, parsed: list[str]) -> None:
    first = store.load(folder, COLUMNS)
    assert len(parsed) == 6
    again = store.load(folder, COLUMNS)
    assert len(parsed) == 6
    assert again.equals(first)


@pytest.mark.parametrize("kind", ["append", "rename", "same size and time", "new file", "removed file", "new run"])
def test_only_what_changed_is_read_again(folder: Path, parsed: list[str], kind: str) -> None:
    store.load(folder, COLUMNS)
    run = sorted((folder / "runs").iterdir())[0]
    train, scores = run / "train.jsonl", run / "eval" / "0badcafe.json"
    if kind == "append":
        with train.open("a") as file:
            file.write(json.dumps({"step": 9999, "tokens": 5, "loss": 1.0}) + "\n")
    elif kind == "rename":
        write_json(run / "eval" / "new", {"tasks": {}})
        (run / "eval" / "new").rename(scores)
    elif kind == "same size and time":
        before = train.stat()
        other = run / "other"
        other.write_text(train.read_text().replace('"loss": 5', '"loss": 6'))
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(train)
        assert (train.stat().st_size, train.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    elif kind == "new file":
        write_json(run / "eval" / "steps" / "0badcafe-7.json", json.loads(scores.read_text()))
    elif kind == "removed file":
        scores.unlink()
    else:
        run = folder / "runs" / write_run(folder, "dense", "w64", 0, 9.0)
    parsed.clear()
    table = store.load(folder, COLUMNS)
    assert parsed == [run.name]
    assert table.equals(fresh(folder))


def test_a_vanished_run_is_dropped(folder: Path, parsed: list[str]) -> None:
    store.load(folder, COLUMNS)
    gone = sorted((folder / "runs").iterdir())[2]
    shutil.rmtree(gone)
    parsed.clear()
    table = store.load(folder, COLUMNS)
    assert gone.name not in table["run"].to_pylist()
    assert parsed == []
    assert gone.name not in pq.read_table(folder / store.CACHE)["run"].to_pylist()


def test_named_runs_come_in_their_order_and_leave_the_others_cached(folder: Path, parsed: list[str]) -> None:
    names = [path.name for path in sorted((folder / "runs").iterdir())]
    store.load(folder, COLUMNS)
    (folder / "runs" / names[1] / "state.json").write_text('{"state": "running"}')
    (folder / "runs" / names[4] / "state.json").write_text('{"state": "running"}')
    parsed.clear()
    table = store.load(folder, ["state"], [names[4], "absent", names[0]])
    assert table["run"].to_pylist() == [names[4], names[0]]
    assert table["state"].to_pylist() == ["running", "done"]
    assert parsed == [names[4]]
    store.load(folder, COLUMNS)
    assert parsed == [names[4], names[1]]


@pytest.mark.parametrize("kind", ["schema", "version", "garbage", "truncated"])
def test_a_cache_of_another_schema_or_a_damaged_one_is_rebuilt(folder: Path, parsed: list[str], kind: str) -> None:
    expected = store.load(folder, COLUMNS)
    path = folder / store.CACHE
    table = pq.read_table(path)
    if kind == "schema":
        pq.write_table(table.drop_columns("cause"), path)
    elif kind == "version":
        pq.write_table(table.replace_schema_metadata({"version": "0"}), path)
    else:
        path.write_bytes(b"nonsense" if kind == "garbage" else path.read_bytes()[:500])
    parsed.clear()
    assert store.load(folder, COLUMNS).equals(expected)
    assert len(parsed) == 6
    parsed.clear()
    assert store.load(folder, COLUMNS).equals(expected)
    assert parsed == []


def test_results_that_cannot_be_written_are_read(folder: Path) -> None:
    (folder / "cache").write_text("a file where the cache's folder would be")
    assert len(store.load(folder, COLUMNS)) == 6
    assert (folder / "cache").is_file()


def test_many_readers_at_once_see_whole_tables(folder: Path) -> None:
    expected = fresh(folder)

    def change_and_read(number: int) -> bool:
        path = folder / "runs" / expected["run"][number % 6].as_py() / "state.json"
        other = path.with_name(f"other{number}")
        other.write_text(path.read_text())
        other.rename(path)
        return bool(store.load(folder, COLUMNS).equals(expected))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(change_and_read, range(40)))
    assert [path.name for path in (folder / "cache" / "analysis").iterdir()] == ["records.parquet"]
