"""Loggers of training: train.jsonl always, TensorBoard and Weights & Biases on request.

To add one, write a class with `log` and `close`, and add its name to `LOGGERS` and to `cells.LoggerName`.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from suite.cells import Cell, LoggerName
from suite.errors import UserError
from suite.records import RunDir

WANDB_PROJECT = "next-parameter"


class Logger(Protocol):
    """Receives the records of one run, in order of steps."""

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Log one record: scalars by name, in mappings and lists of any depth."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines:
    """train.jsonl, one line per record."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line."""
        self.run.append_train({"step": step, **record})

    def close(self) -> None:
        """Do nothing, since every line is written immediately."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`; a resumed run hides the events after its checkpoint."""

    def __init__(self, run: RunDir, cell: Cell, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write one scalar event per value."""
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WandB:
    """A Weights & Biases run, continued when training resumes. WANDB_PROJECT and WANDB_MODE apply as usual."""

    def __init__(self, run: RunDir, cell: Cell, step: int) -> None:
        import wandb

        id_file = run.path / "wandb" / "run-id"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=run.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run.path),
            config=cell.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")  # so that steps repeated after a resume are accepted

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write one history row."""
        self.run.log({"step": step, **scalars(record)})

    def close(self) -> None:
        """Upload the remaining rows and end the wandb process."""
        self.run.finish()


LOGGERS: dict[LoggerName, Callable[[RunDir, Cell, int], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""Loggers by name. The package and the extra that installs it have the same name."""


def require_packages(names: Iterable[LoggerName]) -> None:
    """Raise UserError, which names the extra, if the package of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install 'next-parameter[{name}]'"
            raise UserError(f"train.loggers: {name} is not installed; run {remedy} or remove it from train.loggers")


def open_loggers(run: RunDir, cell: Cell, step: int) -> list[Logger]:
    """Open the loggers of a cell.

    Args:
        run: The run directory.
        cell: The cell.
        step: The step after which training starts or resumes.

    Returns:
        The loggers, that of train.jsonl first.

    Raises:
        UserError: The package of a logger is not installed.
    """
    require_packages(cell.train.loggers)
    return [JsonLines(run), *(LOGGERS[name](run, cell, step) for name in cell.train.loggers)]


def scalars(record: Any, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record by path, such as `probe/storage/bits`; other values are dropped."""
    if isinstance(record, int | float):
        return {prefix: record}
    if isinstance(record, Mapping):
        items: Iterable[tuple[Any, Any]] = record.items()
    elif isinstance(record, list | tuple):
        items = enumerate(record)
    else:
        return {}
    return {
        name: value
        for key, part in items
        for name, value in scalars(part, f"{prefix}/{key}" if prefix else str(key)).items()
    }
