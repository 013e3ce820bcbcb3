"""Timing, heartbeats and the progress bar of a run in training."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from typing import TYPE_CHECKING

import torch

from suite.records import RunDir

if TYPE_CHECKING:
    from rich.progress import Progress

HEARTBEAT_S = 2.0


class Telemetry:
    """Timing, heartbeat and progress of one run.

    `train_s` is the time spent in training steps, without probes, checkpoints and start-up; a resumed run continues the
    count. Progress and ETA go to the run's state file, and to a progress bar on a terminal if rich is installed.
    `quiet` disables both. `waits`: steps wait for a device, a process or a thread, so that their CPU time does not show
    how busy the machine was.
    """

    def __init__(
        self, run: RunDir, first_step: int, total_steps: int, train_s: float, waits: bool, quiet: bool = False
    ) -> None:
        self.run, self.waits, self.quiet = run, waits, quiet
        self.first_step = first_step
        self.total_steps = total_steps
        self.train_s = train_s
        self._started = time.monotonic()
        self._last_beat = 0.0
        self._window_tokens = 0
        self._window_s = 0.0
        self._window_cpu_s = 0.0
        self._bar = None if quiet else progress_bar()
        if self._bar is not None:
            self._task = self._bar.add_task(run.name, total=total_steps, completed=first_step, note="")
            self._bar.start()

    def stepped(self, step: int, tokens: int, seconds: float, cpu_s: float, loss: float) -> None:
        """Record a training step.

        Args:
            step: Steps taken so far.
            tokens: Positions in this step.
            seconds: Its duration.
            cpu_s: The CPU time of this process during the step, in seconds.
            loss: Its loss.
        """
        self.train_s += seconds
        self._window_s += seconds
        self._window_cpu_s += cpu_s
        self._window_tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=f"loss {loss:.3f}")
        now = time.monotonic()
        if not self.quiet and now - self._last_beat >= HEARTBEAT_S:
            self._last_beat = now
            done = step - self.first_step
            eta_s = (now - self._started) / done * (self.total_steps - step)
            self.run.beat(step / self.total_steps, eta_s)

    def speed(self) -> dict[str, float]:
        """Return the tokens per second since the last call, and the peak memory in bytes.

        If steps wait for nothing, "cpu_share" is the share of a core that they had.
        """
        speed = self._window_tokens / self._window_s if self._window_s else 0.0
        share = {} if self.waits or not self._window_s else {"cpu_share": round(self._window_cpu_s / self._window_s, 3)}
        self._window_tokens, self._window_s, self._window_cpu_s = 0, 0.0, 0.0
        return {"tokens_per_s": round(speed, 1), **share, "memory_bytes": peak_memory_bytes()}

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()


def shows_progress() -> bool:
    """Return whether a bar can be shown: on a terminal, with rich, which training does not need."""
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def progress_bar(in_percent: bool = False) -> Progress | None:
    """Return a bar on stderr, with what is done as a count or in percent; None where none can be shown."""
    if not shows_progress():
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    done = TaskProgressColumn() if in_percent else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    console = Console(file=sys.stderr)  # stdout may be a file, and sys.stderr may be replaced while lm-eval runs
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)


def peak_memory_bytes() -> int:
    """Return the peak bytes allocated on the GPU, or without one the peak resident set size of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
