"""Where the records of a run in training go: train.jsonl always, TensorBoard and Weights & Biases on request.

To add one: a class with `log` and `close`, and its name in `LOGGERS` and in `cells.LoggerName`.
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
        """Nothing to do: every line is written at once."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`; a resumed run hides the events after its checkpoint."""

    def __init__(self, run: RunDir, cell: Cell, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """One scalar event per value."""
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WandB:
    """A Weights & Biases run, which is continued when the run resumes. WANDB_PROJECT and WANDB_MODE apply as usual."""

    def __init__(self, run: RunDir, cell: Cell, step: int) -> None:
        import wandb

        id_file = run.path / "wandb" / "run-id"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            name=run.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run.path),
            config=cell.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")  # so that steps repeated after a resume are accepted

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """One history row."""
        self.run.log({"step": step, **scalars(record)})

    def close(self) -> None:
        """Upload what is left and end the process of wandb."""
        self.run.finish()


LOGGERS: dict[LoggerName, Callable[[RunDir, Cell, int], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By name, which is also that of the package and of the extra that installs it."""


def require_packages(names: Iterable[LoggerName]) -> None:
    """UserError naming the extra if the package of a logger is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install 'next-parameter[{name}]'"
            raise UserError(f"train.loggers: {name} is not installed; run {remedy} or remove it from train.loggers")


def open_loggers(run: RunDir, cell: Cell, step: int) -> list[Logger]:
    """The loggers of a cell whose training starts or resumes after `step`. UserError: a package is missing."""
    require_packages(cell.train.loggers)
    return [JsonLines(run), *(LOGGERS[name](run, cell, step) for name in cell.train.loggers)]


def scalars(record: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of a nested record by path, such as `probe/storage/bits`; everything else is left out."""
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
