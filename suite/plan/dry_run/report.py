"""Compares plans with a step of rank 0 of their meshes on fake tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from suite.cells import Cell
from suite.errors import UserError
from suite.models.accounting import account_of, meta_model
from suite.plan.activation_memory import StepTracer
from suite.plan.dry_run.rank_zero import Measurements
from suite.plan.mesh import Mesh
from suite.plan.plan import CellPlan
from suite.plan.table_state import table_state
from suite.plan.traffic import Sent, sent_bytes

KERNEL_VARIABLES = ("TRITON_INTERPRET", "KERNELS_BACKEND")
"""Variables that select other kernels than those of a GPU."""
MICRO_BATCHES = 2
"""Most micro-batches of the step: from the second one on, gradients of earlier ones are allocated."""


@dataclass(frozen=True)
class DryRun:
    """A step of rank 0 of a mesh: planned and measured, in bytes.

    Attributes:
        mesh: The mesh, with the micro-batches of this step and its planned memory.
        sent: What rank 0 sends, as planned.
        measured: What was measured.
    """

    mesh: Mesh
    sent: Sent
    measured: Measurements

    @property
    def ratios(self) -> dict[str, float]:
        """Measured peak and bytes sent relative to the plan's, and weights relative to an even share of them."""
        measured = self.measured
        sent = sum(measured.sent.values())
        return {
            "peak": measured.peak / self.mesh.memory.peak,
            "sent": sent / self.sent.total if self.sent.total else float(sent == 0),
            "weights": measured.weights / measured.even_weights,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a cell in `suite plan --dry-run-mesh --json`."""
        return {
            "micro_batches": self.mesh.accumulate,
            "planned": {"peak": self.mesh.memory.peak, "weights": self.mesh.memory.weights, "sent": asdict(self.sent)},
            "measured": asdict(self.measured),
            "ratios": self.ratios,
        }


def dry_runs_of(plans: list[CellPlan], capability: int) -> dict[str, DryRun]:
    """Return the dry runs of all meshes of several GPUs, by name of the run; cells with equal steps are traced once.

    `capability` is the major compute capability of the GPUs.
    """
    runs: dict[str, DryRun] = {}
    traced: dict[object, DryRun] = {}
    for cell_plan in plans:
        cell, mesh = cell_plan.cell, cell_plan.mesh
        if mesh is None or mesh.gpus == 1:
            continue
        train = cell.train.model_dump(exclude={"tokens", "epochs", "lr", "warmup"})
        key = cell.model.model_dump_json(), str(train), cell.data.seq_len, mesh
        if key not in traced:
            traced[key] = dry_run(cell, cell_plan.vocabulary, mesh, capability)
        runs[cell.run_name] = traced[key]
    return runs


def dry_run(cell: Cell, vocabulary: int, mesh: Mesh, capability: int) -> DryRun:
    """Take a step of rank 0 of a mesh on fake tensors, in a separate process.

    Args:
        cell: The cell.
        vocabulary: Entries of its vocabulary.
        mesh: The planned mesh.
        capability: Major compute capability of its GPUs.

    Returns:
        The step, planned and measured, with at most MICRO_BATCHES micro-batches.

    Raises:
        UserError: The step cannot be traced.
    """
    accumulate = min(mesh.accumulate, MICRO_BATCHES)
    model = meta_model(cell.model, vocabulary)
    tracer = StepTracer(model, cell.data.seq_len, cell.train.precision, capability=capability)
    traced = tracer.parts(mesh.micro_rows)
    memory = traced.step(mesh.gpus, mesh.table_shards, accumulate, table_state(cell.train, on_gpu=True))
    step = Mesh(mesh.gpus, mesh.table_shards, mesh.micro_rows, accumulate, memory)
    sent = sent_bytes(model, account_of(model, cell.data.seq_len), cell, step)
    return DryRun(step, sent, _measure(cell, vocabulary, step, capability))


def _measure(cell: Cell, vocabulary: int, mesh: Mesh, capability: int) -> Measurements:
    request = {
        "cell": cell.model_dump(mode="json"),
        "vocabulary": vocabulary,
        "gpus": mesh.gpus,
        "table_shards": mesh.table_shards,
        "micro_rows": mesh.micro_rows,
        "accumulate": mesh.accumulate,
        "capability": capability,
    }
    command = [sys.executable, "-m", "suite.plan.dry_run.rank_zero"]
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_VARIABLES}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise UserError(f"cell {cell.run_name}: the dry run of its mesh failed: {reason}")
    return Measurements(**json.loads(done.stdout))


def dry_run_table(runs: dict[str, DryRun]) -> Table:
    """Return a table of what rank 0 holds and sends in a step, next to the plan; by name of the run."""
    table = Table(title="rank 0 in one step, on fake tensors / planned", title_justify="left")
    for column in ("run", "GPUs", "micro-batches", "GB/GPU", "GB sent", "weights / even share", "collectives", "CPU s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run in runs.items():
        measured = run.measured
        table.add_row(
            name,
            str(run.mesh.gpus),
            str(run.mesh.accumulate),
            f"{measured.peak / 1e9:.3g} / {run.mesh.memory.peak / 1e9:.3g}",
            f"{sum(measured.sent.values()) / 1e9:.3g} / {run.sent.total / 1e9:.3g}",
            f"{run.ratios['weights']:.3f}",
            ", ".join(f"{count} {kind}" for kind, count in sorted(measured.calls.items())),
            f"{measured.cpu_s:.0f}",
        )
    return table
