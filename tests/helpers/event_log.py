"""A watcher of a sweep for tests: it collects events and checks that counts add up."""

from __future__ import annotations

from suite.launch.sweep import Standing


class EventLog:
    """A watcher that collects events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, text: str) -> None:
        self.events.append(text)

    def progress(self, standing: Standing) -> None:
        assert standing.finished + len(standing.running) <= standing.cells
