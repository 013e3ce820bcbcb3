"""The run directory: one cell's records on disk, every file complete or absent.

`train.jsonl` alone grows in place; it is cut back to the checkpoint's step when a run resumes, so that a run that
was killed leaves the same lines as one that was not. Everything else is written beside, synced and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from suite.atomic import write_json, write_text
from suite.baselines import loading
from suite.cells import Cell, with_current_names
from suite.models import registry

State = Literal["pending", "running", "done", "failed"]


class Locked(Exception):
    """Another live process holds the run."""


class RunDir:
    """A run's folder, `results/runs/<slug>-<hash8>`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.cell_path = self.path / "cell.json"
        self.train_path = self.path / "train.jsonl"
        self.state_path = self.path / "state.json"
        self.usage_path = self.path / "usage.json"
        self.checkpoints = self.path / "checkpoints"
        self.baseline_path = self.path / "baseline.py"

    @property
    def name(self) -> str:
        """The folder's name, which is the run's."""
        return self.path.name

    def read_record(self) -> dict[str, Any]:
        """The whole of cell.json: the cell, its hash, account, versions and data fingerprint."""
        record: dict[str, Any] = json.loads(self.cell_path.read_text())
        return record | {"cell": with_current_names(record["cell"])} if "cell" in record else record

    def read_cell(self) -> Cell:
        """The cell this run is of; the baseline it keeps is read first, if it keeps one. Raises UserError for it."""
        if self.baseline_path.exists():
            loading.load(self.baseline_path)
        return Cell.model_validate(self.read_record()["cell"])

    def write_cell(self, cell: Cell, **facts: Any) -> None:
        """cell.json: the cell in full, its hash, and facts about it (account, versions, data_fingerprint).

        The file of a family from outside the package is kept beside it, so that the run needs nothing else.
        """
        origin = registry.family(cell.model.family).path
        if cell.baseline is not None and origin is not None and not self.baseline_path.exists():
            write_text(self.baseline_path, origin.read_text())
        write_json(
            self.cell_path,
            {"cell": cell.model_dump(mode="json"), "hash": cell.hash8, "run": self.name, **facts},
        )

    def append_train(self, line: dict[str, Any]) -> None:
        """One line of train.jsonl, in one write."""
        with self.train_path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def train_lines(self) -> list[dict[str, Any]]:
        """The whole lines of train.jsonl; a last line cut short by a kill is left out."""
        if not self.train_path.exists():
            return []
        text = self.train_path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def cut_train(self, step: int) -> None:
        """Drop the lines written after `step`: training resumes there and writes them again."""
        kept = [line for line in self.train_lines() if line["step"] <= step]
        write_text(self.train_path, "".join(json.dumps(line) + "\n" for line in kept))

    def write_eval(self, hash8: str, content: dict[str, Any]) -> None:
        """eval/<hash8>.json, the scores of one evaluation."""
        write_json(self.path / "eval" / f"{hash8}.json", content)

    def has_eval(self, hash8: str) -> bool:
        """Whether that evaluation's scores are there."""
        return (self.path / "eval" / f"{hash8}.json").exists()

    def write_usage(self, content: dict[str, Any]) -> None:
        """usage.json, how the memory's rows were used."""
        write_json(self.usage_path, content)

    def state(self) -> dict[str, Any]:
        """state.json, or a pending state where there is none."""
        try:
            content: dict[str, Any] = json.loads(self.state_path.read_text())
        except FileNotFoundError:
            content = {"state": "pending", "progress": 0.0, "eta_s": None, "cause": None}
        return content

    def set_state(self, state: State, cause: str | None = None, **extra: Any) -> None:
        """Write state.json, keeping what earlier states said that this one does not change."""
        now = time.time()
        facts = {
            "state": state,
            "cause": cause,
            "heartbeat": now,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_json(self.state_path, {**self.state(), **facts, **extra})

    def beat(self, progress: float, eta_s: float | None) -> None:
        """The run is alive: the share done (0 to 1) and the seconds it still expects to need."""
        self.set_state("running", progress=round(progress, 4), eta_s=None if eta_s is None else round(eta_s, 1))

    @contextmanager
    def lock(self, patience_s: float = 1.0) -> Iterator[None]:
        """Hold the run; the system frees it when the process dies, however it dies.

        Tried for `patience_s`, since `is_locked` takes the lock for an instant to look; then raises Locked.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience_s
        with (self.path / ".lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Locked(f"{self.path}: held by another process") from None
                    time.sleep(0.02)
            yield

    def is_locked(self) -> bool:
        """Whether a live process holds the run."""
        try:
            with self.lock(patience_s=0.0):
                return False
        except Locked:
            return True
