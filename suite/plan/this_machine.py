"""Plans for the CPU of this machine, from the speed of its own finished runs."""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from suite.cells import Cell
from suite.errors import UserError
from suite.plan.gpus import CPU, USABLE, Gpu
from suite.plan.plan import CellPlan
from suite.records import RUNS, RunDir


@dataclass(frozen=True)
class Speed:
    """FLOPs per second of a finished run."""

    family: str
    base: str
    threads: int
    flops: float


def speeds(results: Path) -> list[Speed]:
    """Return the speeds of the finished runs that this machine trained on its CPU.

    Raises UserError if there is none.
    """
    measured = [speed for path in sorted((results / RUNS).glob("*")) if (speed := _speed(RunDir(path))) is not None]
    if not measured:
        raise UserError(
            f"--gpu {CPU}: {results} holds no finished run that was trained on the CPU of this machine; train one, for "
            "example with suite sweep smoke"
        )
    return measured


def _speed(run: RunDir) -> Speed | None:
    if run.damage() is not None or not run.cell_path.exists():
        return None
    state, record = run.state(), run.read_record()
    if not state.get("trained") or state.get("host") != socket.gethostname() or record.get("device") != CPU:
        return None
    last, cell = run.last_train_line(), record["cell"]
    if not last.get("wall_s"):
        return None
    return Speed(cell["model"]["family"], cell["model"]["base"], cell["threads"], last["train_flops"] / last["wall_s"])


def flops_per_s(cell: Cell, measured: list[Speed]) -> float:
    """Return the median speed of the runs most like a cell: of its family and base, else of its base, else of all."""
    family, base, threads = cell.model.family, cell.model.base, cell.threads
    like = (
        [speed for speed in measured if (speed.family, speed.base, speed.threads) == (family, base, threads)],
        [speed for speed in measured if (speed.family, speed.base) == (family, base)],
        [speed for speed in measured if speed.base == base],
        measured,
    )
    return statistics.median(speed.flops for speed in next(speeds for speeds in like if speeds))


def cpu(measured: list[Speed], memory: float) -> Gpu:
    """Return this machine as the device of a plan; its speed is replaced by that of each cell (`with_speeds`).

    Args:
        measured: Speeds of finished runs.
        memory: Bytes that a process may use.
    """
    flops = statistics.median(speed.flops for speed in measured)
    return Gpu(CPU, memory / USABLE, flops, bandwidth=1e10, link=1e10, price=0.0, per_node=1)


def with_speeds(plans: list[CellPlan], measured: list[Speed]) -> list[CellPlan]:
    """Return the plans with hours from measured speeds, which include the traffic of tables."""
    return [
        replace(plan, gpu_hours=hours, compute_hours=hours, table_hours=0.0)
        for plan in plans
        for hours in [plan.total_flops / flops_per_s(plan.cell, measured) / 3600]
    ]
