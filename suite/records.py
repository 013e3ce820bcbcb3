"""The run directory: one cell's records on disk. Every file is complete or absent.

Only `train.jsonl` grows in place; when a run resumes it is truncated to the checkpoint's step, so that a killed run
leaves the same lines as an uninterrupted one. All other files are written to a temporary name, synced and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from suite.atomic import write_json, write_text, writing
from suite.baselines import loading
from suite.cells import Cell, with_current_names
from suite.errors import UserError
from suite.models import registry
from suite.yaml_input import explain

State = Literal["pending", "running", "done", "failed"]
STATES = get_args(State)

RUNS = "runs"
GRIDS = "grids"
TAIL_BYTES = 16384
"""Bytes of train.jsonl that are read first to find its last line."""
CELL_FACTS = ("cell", "hash", "run")
"""Fields of cell.json that `write_cell` writes itself; all others are carried over when it is written again."""


class Locked(Exception):
    """Another live process holds the run's lock."""


class DamagedRecord(UserError):
    """A record file that cannot be read; the message names the file and the remedy."""


def _parse(content: bytes) -> Any:
    """Return the value of JSON as records hold it, without NaN and infinity. Raises ValueError."""
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a record file. Raises FileNotFoundError, or DamagedRecord with `remedy`."""
    try:
        content = _parse(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise DamagedRecord(f"{path}: is damaged: not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise DamagedRecord(f"{path}: is damaged: not a JSON object; {remedy}")
    return content


def read_if_present(path: Path, remedy: str) -> dict[str, Any] | None:
    """Return the JSON object in a record file; None without the file. Raises DamagedRecord with `remedy`."""
    try:
        return read_json(path, remedy)
    except FileNotFoundError:
        return None


def run_dir(results: Path, cell: Cell) -> RunDir:
    """Return the run directory of a cell."""
    return RunDir(results / f"{RUNS}/{cell.run_name}")


@dataclass(frozen=True)
class Records:
    """The contents of a run's record files, each read once.

    Attributes:
        state: state.json; a pending state without it.
        record: cell.json; None without it.
        last_line: The last complete line of train.jsonl; empty without one.
        evals: The files of eval/ by evaluation hash, in a fixed order.
    """

    state: dict[str, Any]
    record: dict[str, Any] | None
    last_line: dict[str, Any]
    evals: dict[str, dict[str, Any]]


class RunDir:
    """A run's folder, `results/runs/<slug>-<hash8>`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self.path.name

    @property
    def cell_path(self) -> Path:
        """Path of cell.json."""
        return self.path / "cell.json"

    @property
    def train_path(self) -> Path:
        """Path of train.jsonl."""
        return self.path / "train.jsonl"

    @property
    def state_path(self) -> Path:
        """Path of state.json."""
        return self.path / "state.json"

    @property
    def usage_path(self) -> Path:
        """Path of usage.json."""
        return self.path / "usage.json"

    @property
    def jobs_path(self) -> Path:
        """Path of the record of Slurm jobs."""
        return self.path / "logs/slurm.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def baseline_path(self) -> Path:
        """Path of the copy of an external baseline's source."""
        return self.path / "baseline.py"

    @property
    def tokenizer_path(self) -> Path:
        """Path of the copy of the tokenizer."""
        return self.path / "tokenizer.json"

    def read_record(self) -> dict[str, Any]:
        """Return all of cell.json: the cell, its hash, account, versions and data fingerprint.

        Raises FileNotFoundError, or DamagedRecord.
        """
        record = read_json(self.cell_path, self._restore)
        if not isinstance(record.get("cell"), dict):
            raise DamagedRecord(f"{self.cell_path}: is damaged: it has no field cell; {self._restore}")
        if not isinstance(record.get("versions", {}), dict):
            raise DamagedRecord(f"{self.cell_path}: is damaged: its field versions is not a mapping; {self._restore}")
        return record | {"cell": with_current_names(record["cell"])}

    def read_cell(self) -> Cell:
        """Return the run's cell. Its baseline.py, if it has one, is loaded first. Raises UserError."""
        if self.baseline_path.exists():
            loading.load(self.baseline_path)
        fields = self.read_record()["cell"]
        try:
            return Cell.model_validate(fields)
        except ValidationError as error:
            raise UserError(
                f"{self.cell_path}: {explain(error, Cell, fields)}; use the version that made the run, or move the "
                f"folder {self.path} away"
            ) from None

    def write_cell(self, cell: Cell, **facts: Any) -> None:
        """Write cell.json: the cell with all its fields, its hash, and `facts` (account, versions, data_fingerprint).

        The source of an external baseline is copied to baseline.py, so that the run needs no other file.
        """
        origin = registry.family(cell.model.family).path
        if cell.baseline is not None and origin is not None and not self.baseline_path.exists():
            write_text(self.baseline_path, origin.read_text(encoding="utf-8"))
        write_json(
            self.cell_path,
            {"cell": cell.model_dump(mode="json"), "hash": cell.hash8, "run": self.name, **facts},
        )

    def append_train(self, line: dict[str, Any]) -> None:
        """Append one line to train.jsonl, in one write. Raises DiskFull."""
        with writing(self.train_path), self.train_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def train_lines(self) -> list[dict[str, Any]]:
        """Return the complete lines of train.jsonl, without a last one truncated by a kill. Raises DamagedRecord."""
        if not self.train_path.exists():
            return []
        content = self.train_path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        return [self._parse_line(line) for line in lines]

    def last_train_line(self) -> dict[str, Any]:
        """Return the last complete line of train.jsonl, read from the file's end; empty if there is none.

        Raises DamagedRecord.
        """
        try:
            file = self.train_path.open("rb")
        except FileNotFoundError:
            return {}
        with file:
            size = file.seek(0, os.SEEK_END)
            length = min(size, TAIL_BYTES)
            while length:
                file.seek(size - length)
                lines = file.read(length).rpartition(b"\n")[0].split(b"\n")
                if len(lines) > 1 or length == size:
                    return self._parse_line(lines[-1]) if lines[-1] else {}
                length = min(size, 4 * length)
        return {}

    def _parse_line(self, line: bytes) -> dict[str, Any]:
        try:
            content = _parse(line)
        except ValueError as error:
            raise DamagedRecord(f"{self.train_path}: is damaged: not JSON ({error}); {self._restore}") from None
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise DamagedRecord(
                f"{self.train_path}: is damaged: a line is not a JSON object with a step; {self._restore}"
            )
        return content

    def cut_train(self, step: int) -> None:
        """Drop the lines after `step`: training resumes there and writes them again."""
        lines = [line for line in self.train_lines() if line["step"] <= step]
        write_text(self.train_path, "".join(json.dumps(line) + "\n" for line in lines))

    def eval_path(self, hash8: str) -> Path:
        """Return the path of the scores of one evaluation."""
        return self.path / f"eval/{hash8}.json"

    def write_eval(self, hash8: str, content: dict[str, Any]) -> None:
        """Write eval/<hash8>.json, the scores of one evaluation."""
        write_json(self.eval_path(hash8), content)

    def has_eval(self, hash8: str) -> bool:
        """Return whether the scores of that evaluation exist."""
        return self.eval_path(hash8).exists()

    def read_eval(self, path: Path) -> dict[str, Any]:
        """Return the content of a file of eval/. Raises DamagedRecord."""
        remedy = "delete the file and the same command scores the run again"
        content = read_json(path, remedy)
        tasks = content.get("tasks")
        if not isinstance(tasks, dict):
            raise DamagedRecord(f"{path}: is damaged: it has no field tasks; {remedy}")
        for name, task in tasks.items():
            if not isinstance(task, dict) or not isinstance(task.get("metrics"), dict):
                raise DamagedRecord(f"{path}: is damaged: its task {name} has no metrics; {remedy}")
        return content

    def eval_paths(self) -> list[Path]:
        """Return the scores in eval/, in a fixed order; copies of them and files of others are left out."""
        folder = self.path / "eval"
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        return [folder / name for name in sorted(names) if re.fullmatch(r"[0-9a-f]{8}\.json", name)]

    def write_usage(self, content: dict[str, Any]) -> None:
        """Write usage.json, how the rows of the memory are used."""
        write_json(self.usage_path, content)

    def state(self) -> dict[str, Any]:
        """Return the content of state.json; a pending state if the file does not exist. Raises DamagedRecord."""
        remedy = "delete the file and the same command resumes the run from its last checkpoint"
        content = read_if_present(self.state_path, remedy)
        if content is None:
            return {"state": "pending", "progress": 0.0, "eta_s": None, "cause": None}
        if content.get("state") not in STATES:
            raise DamagedRecord(f"{self.state_path}: is damaged: its field state is not a state; {remedy}")
        if not isinstance(content.get("progress", 0.0), int | float):
            raise DamagedRecord(f"{self.state_path}: is damaged: its field progress is not a number; {remedy}")
        return content

    def jobs(self) -> dict[str, Any]:
        """Return the newest Slurm job of each stage, by stage. Raises DamagedRecord."""
        return read_if_present(self.jobs_path, "cancel the run's jobs with scancel and delete the file") or {}

    def read_all(self) -> Records:
        """Return what the record files hold. Of train.jsonl only the last line is read.

        Raises:
            DamagedRecord: A record file cannot be read or is missing; the message names the first, with the remedy.
        """
        try:
            state = self.state()
            record = self._record_if_present()
            last_line = self.last_train_line()
            evals = {path.stem: self.read_eval(path) for path in self.eval_paths()}
            read_if_present(self.usage_path, f"delete the file and suite eval {self.name} writes it again")
            self.jobs()
        except OSError as error:
            text = f"{error.filename or self.path}: cannot be read ({error.strerror}); check its permissions"
            raise DamagedRecord(text) from None
        return Records(state, record, last_line, evals)

    def _record_if_present(self) -> dict[str, Any] | None:
        """Return cell.json's content; None without the file. Raises DamagedRecord if a file that follows it exists."""
        try:
            return self.read_record()
        except FileNotFoundError:
            if self.state_path.exists() or self.train_path.exists():
                raise DamagedRecord(f"{self.cell_path}: is missing; {self._restore}") from None
            return None

    def damage(self) -> str | None:
        """Return the first record file that cannot be read or is missing, with the remedy; None if there is none."""
        try:
            self.read_all()
        except DamagedRecord as error:
            return str(error)
        return None

    @property
    def _restore(self) -> str:
        return f"restore the file, or move the folder {self.path} away and the same command trains the cell again"

    def set_state(self, state: State, cause: str | None = None, **extra: Any) -> None:
        """Update state.json; fields that are not passed retain their values."""
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
        """Record that the run is alive: the fraction done (0 to 1) and the estimated seconds to its end."""
        self.set_state("running", progress=round(progress, 4), eta_s=None if eta_s is None else round(eta_s, 1))

    def beat_scoring(self, part: str | None, share: float = 0.0, eta_s: float | None = None) -> None:
        """Record a part of scoring, the fraction of it that is done, and the estimated seconds to its end.

        None: the part has ended. The state of the run stays what it is.
        """
        content = self.state()
        scoring = None if part is None else {"part": part, "share": round(share, 4)}
        left = None if eta_s is None else round(eta_s, 1)
        self.set_state(content["state"], content.get("cause"), scoring=scoring, eta_s=left)

    @contextmanager
    def lock(self, patience_s: float = 1.0) -> Iterator[None]:
        """Hold the run's lock; the system releases it when the process ends for any reason.

        Retries for `patience_s` seconds, since `is_locked` takes the lock for an instant. Raises Locked after that, and
        UserError if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); use another --results") from None
        deadline = time.monotonic() + patience_s
        with file:
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
        """Return whether a live process holds the run's lock. Writes nothing: the folder may be read-only."""
        try:
            file = (self.path / ".lock").open(encoding="utf-8")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
