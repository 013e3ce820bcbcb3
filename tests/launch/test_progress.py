"""The estimate of a sweep's remaining time, and the number of concurrent cells."""

import pytest

from suite.launch.local import default_jobs, usable_cores
from suite.launch.progress import Clock, share_done
from suite.launch.status import duration
from suite.launch.sweep import Standing


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
    assert clock.remaining_s(Standing(4, 2, running, frozenset({"a"})), 10.0) is not None
    assert clock.remaining_s(Standing(4, 2, running, frozenset({"a", "b"})), 10.0) is None
    waiting = Standing(5, 2, running, frozenset({"a", "b"}))
    assert clock.remaining_s(waiting, 10.0) is not None


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
