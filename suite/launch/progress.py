"""Showing a sweep on stderr: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from suite.launch.status import duration
from suite.launch.sweep import Standing

PLAIN_LINE_EVERY_S = 15.0


class Clock:
    """Estimates the remaining seconds of a sweep from what was done since the first call."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def remaining_s(self, standing: Standing, now: float) -> float | None:
        """Return the remaining seconds at time `now` (seconds, any origin).

        None until half a cell is done, and once every remaining cell is being scored.
        """
        done = share_done(standing) * standing.cells
        left = standing.cells - standing.finished
        if left and left == sum(name in standing.scoring for name, _, _ in standing.running):
            return None
        if self._first is None:
            self._first = (now, done)
        started, done_then = self._first
        if done < done_then + 0.5:
            return None
        return (now - started) / (done - done_then) * (standing.cells - done)


def share_done(standing: Standing) -> float:
    """Return the fraction of the sweep that is done, 0 to 1; running cells count by their progress."""
    return (standing.finished + sum(progress for _, progress, _ in standing.running)) / standing.cells


class PlainWatcher:
    """Lines on stderr, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._logged = time.monotonic()

    def __enter__(self) -> PlainWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def event(self, text: str) -> None:
        """Print one line, with the time."""
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def progress(self, standing: Standing) -> None:
        """Print one line every 15 seconds."""
        now = time.monotonic()
        remaining_s = self._clock.remaining_s(standing, now)
        if now - self._logged >= PLAIN_LINE_EVERY_S:
            self._logged = now
            left = "" if remaining_s is None else f", about {duration(remaining_s)} to go"
            running = ", ".join(
                f"{name} {standing.scoring.get(name, f'{progress:.0%}')}" for name, progress, _ in standing.running
            )
            self.event(f"{standing.finished}/{standing.cells} cells finished{left}; running: {running or 'none'}")


class BarWatcher:
    """Bars on a terminal: one for the sweep, one for every running cell."""

    def __init__(self, console: Console) -> None:
        self._clock = Clock()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._whole = self._bars.add_task("sweep", total=1.0, left="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarWatcher:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def event(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, standing: Standing) -> None:
        """Redraw the bars."""
        remaining_s = self._clock.remaining_s(standing, time.monotonic())
        text = f"{standing.finished}/{standing.cells} cells" + (
            "" if remaining_s is None else f", {duration(remaining_s)} left"
        )
        self._bars.update(self._whole, completed=share_done(standing), left=text)
        names = {name for name, _, _ in standing.running}
        for name in set(self._tasks) - names:
            self._bars.remove_task(self._tasks.pop(name))
        for name, progress, eta_s in standing.running:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=1.0, left="")
            left = standing.scoring.get(name, f"{duration(eta_s)} left" if eta_s else "")
            self._bars.update(self._tasks[name], completed=progress, left=left)


def watcher(console: Console) -> PlainWatcher | BarWatcher:
    """Return bars if the console is a terminal, otherwise lines."""
    return BarWatcher(console) if console.is_terminal else PlainWatcher(console)
