"""The estimate of a sweep's remaining time, and the number of concurrent cells."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_cells import tiny_cell

from suite.cells import EvalConfig
from suite.launch import progress, scoring, worker
from suite.launch.local import default_jobs, usable_cores
from suite.launch.preparation import prepare
from suite.launch.progress import Clock, PlainWatcher, share_done
from suite.launch.status import cell_status, duration, scoring_line
from suite.launch.sweep import Standing
from suite.records import RunDir


def test_the_clock_extrapolates_from_the_progress_since_its_first_call() -> None:
    clock = Clock()
    assert clock.remaining_s(Standing(10, 4, []), 100.0) is None
    assert clock.remaining_s(Standing(10, 4, [("run", 0.4, None)]), 110.0) is None
    # 1.5 cells took 30 seconds, so the remaining 4.5 take 20 seconds each.
    halfway = Standing(10, 5, [("run", 0.5, None)])
    assert clock.remaining_s(halfway, 130.0) == pytest.approx(90.0)
    assert share_done(halfway) == pytest.approx(0.55)


def test_there_is_no_estimate_once_all_cells_are_trained_and_scored() -> None:
    clock = Clock()
    running = [("a", 1.0, None), ("b", 1.0, None)]
    assert clock.remaining_s(Standing(4, 0, []), 0.0) is None
    assert clock.remaining_s(Standing(4, 2, running, {"a": "scoring"}), 10.0) is not None
    assert clock.remaining_s(Standing(4, 2, running, {"a": "scoring", "b": "scoring"}), 10.0) is None
    waiting = Standing(5, 2, running, {"a": "scoring", "b": "scoring"})
    assert clock.remaining_s(waiting, 10.0) is not None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_part_of_scoring_shows_its_progress_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = tiny_cell("pkm", epochs=0.5)
    cell = cell.model_copy(update={"data": cell.data.model_copy(update={"seq_len": 32})})
    cell = cell.with_evaluations((EvalConfig(tasks=("bios_storage", "bios_qa"), limit=3),))
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(scoring, "BEAT_S", 0.0)
    run, states, notes = prepare(tmp_path, cell), [], []
    set_state = RunDir.set_state

    def observed(self: RunDir, *args: Any, **facts: Any) -> None:
        set_state(self, *args, **facts)
        states.append(self.state())
        notes.append(cell_status(tmp_path, cell).note)

    monkeypatch.setattr(RunDir, "set_state", observed)
    assert worker.run_cell(run.path) == "done"
    shown = [(state, note) for state, note in zip(states, notes, strict=True) if state.get("scoring")]
    for part, least in (("reads of tables", 10), ("tasks", 2)):
        of_part = [(state, note) for state, note in shown if state["scoring"]["part"] == part]
        shares = [state["scoring"]["share"] for state, _ in of_part]
        assert shares[0] == 0.0
        assert shares[-1] == 1.0
        assert len(shares) > least
        assert shares == sorted(shares)
        assert of_part[0][1] == f"scoring: {part} 0%"
        assert all(state["state"] == "running" and state["eta_s"] >= 0 for state, _ in of_part[1:])
        assert all(re.fullmatch(rf"scoring: {part} \d+%, .+ left", note or "") for _, note in of_part[1:])
        assert re.search(rf"{run.name}: {part} .*%", terminal.getvalue())
    assert run.state()["scoring"] is None
    assert cell_status(tmp_path, cell).note is None

    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    console = Console(file=io.StringIO(), width=200)
    standing = Standing(2, 0, [("a", 1.0, 4.0), ("b", 0.25, 9.0)], {"a": scoring_line(shown[8][0])})
    PlainWatcher(console).progress(standing)
    assert re.search(r"running: a scoring: reads of tables \d+%, .+ left, b 25%", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0 s"), (59.4, "59 s"), (187, "3:07 min"), (7500, "2:05 h")]
)
def test_durations_have_a_readable_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_concurrent_cells_fill_the_cores_or_the_gpus() -> None:
    class Threads:
        def __init__(self, threads: int) -> None:
            self.threads = threads

    assert default_jobs([Threads(1), Threads(1)], gpus=0) == usable_cores()  # type: ignore[list-item]
    assert default_jobs([Threads(10_000)], gpus=0) == 1  # type: ignore[list-item]
    assert default_jobs([Threads(1)], gpus=8) == 8  # type: ignore[list-item]
