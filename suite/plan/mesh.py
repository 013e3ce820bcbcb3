"""The fewest GPUs that a cell fits on, and how its tables and rows are divided among them.

The sharding is that of training: weights, gradients and moments outside tables are divided among all GPUs,
tables by columns among the GPUs of a node (or of several nodes where that takes fewer GPUs), and the rows of a batch
among all GPUs, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from suite.cells import Cell
from suite.models.accounting import Account
from suite.models.transformer import Transformer
from suite.plan.activation_memory import PartCache, StepTracer
from suite.plan.gpus import USABLE, Gpu
from suite.plan.step_memory import STATE_BYTES, Parts, StepMemory
from suite.plan.table_state import table_state

MICRO_ROWS = (8, 4, 2, 1)
"""Candidate numbers of rows per micro-batch; the released template uses the largest."""
MAX_NODES = 512


@dataclass(frozen=True)
class Mesh:
    """A cell on a number of GPUs: how its tables and rows are divided, and the memory of each GPU."""

    gpus: int
    table_shards: int
    micro_rows: int
    accumulate: int
    memory: StepMemory


@dataclass(frozen=True)
class DoesNotFit:
    """Why a cell fits on none of the allowed meshes, and what would make it fit."""

    why: str
    would_fit: str


def smallest_mesh(
    cell: Cell, model: Transformer, counted: Account, gpu: Gpu, nodes: int | None, parts: PartCache
) -> Mesh | DoesNotFit:
    """Find the fewest GPUs on which a cell fits, with the largest micro-batch that does.

    Args:
        cell: The cell.
        model: Its model on the meta device.
        counted: The account of the model.
        gpu: The kind of GPU.
        nodes: Largest number of nodes; None: any.
        parts: Parts of models traced earlier; new ones are added.

    Returns:
        The mesh, or the reason why the cell does not fit.
    """
    meshes, allowed = _Meshes(cell, model, counted, gpu, parts), (nodes or MAX_NODES) * gpu.per_node
    shardings = (meshes.within_nodes, meshes.over_nodes)
    fitting = [mesh for sharding in shardings if (mesh := meshes.smallest(allowed, sharding)) is not None]
    if fitting:
        return min(fitting, key=lambda mesh: mesh.gpus)
    larger = meshes.smallest(MAX_NODES * gpu.per_node, meshes.over_nodes)
    if larger is not None:
        return DoesNotFit(meshes.why(allowed), f"{larger.gpus} GPUs ({-(-larger.gpus // gpu.per_node)} nodes)")
    remedies = ["a shorter row (data.seq_len)", "a GPU with more memory"]
    if meshes.max_gpus(allowed) < max(meshes.gpu_counts(allowed)):
        remedies.insert(0, "a train.batch_rows that more GPUs divide")
    if cell.train.value_second_moment == "row":
        remedies.insert(0, "train.value_second_moment: element, which allows tables to be sharded")
    if cell.train.probe_average is not None:
        remedies.insert(0, "no train.probe_average, which allows several GPUs")
    if cell.train.table_device == "host":
        remedies.insert(0, "train.table_device: model, which allows several GPUs")
    return DoesNotFit(meshes.why(allowed), " or ".join(remedies))


def sharded_elements(model: Transformer, counted: Account) -> tuple[int, int]:
    """Return the parameters outside tables, and the elements of the tables, which are divided by columns."""
    values = sum(table.weight.numel() for table in model.memory_tables())
    return counted.params_total - values, values


class _Meshes:
    """The ways to divide one cell among GPUs of one kind. Its parts are traced once for every micro-batch tried."""

    def __init__(self, cell: Cell, model: Transformer, counted: Account, gpu: Gpu, parts: PartCache) -> None:
        self.cell, self.gpu = cell, gpu
        train, seq_len = cell.train, cell.data.seq_len
        self.tracer = StepTracer(model, seq_len, train.precision, cache=parts, capability=gpu.capability)
        self.usable, self.tables = gpu.memory * USABLE, table_state(cell.train, on_gpu=True)
        self.rest, self.values = sharded_elements(model, counted)
        self.widths = {table.weight.shape[1] for table in model.memory_tables()}
        # With batch statistics, the number of micro-batches is part of the model and must not change.
        self.accumulate = cell.train.accumulate if cell.model.batch_statistics else None
        self.rows = cell.train.batch_rows // (self.accumulate or 1)
        self._parts: dict[int, Parts] = {}

    def within_nodes(self, gpus: int) -> int:
        """Return the number of table shards if tables are divided within a node."""
        return min(self.over_nodes(gpus), self.gpu.per_node)

    def over_nodes(self, gpus: int) -> int:
        """Return the number of table shards over all GPUs; 1 if a row's second moment needs all of its columns."""
        return 1 if self.cell.train.value_second_moment == "row" else gpus

    def gpu_counts(self, allowed: int) -> list[int]:
        """Return the numbers of GPUs to try, at most `allowed`: powers of two within a node, then of nodes.

        A cell with tables in host memory, or with averaged weights, is trained by a single process.
        """
        if self.tables.host or self.tables.average:
            return [1]
        node, powers = self.gpu.per_node, [2**exponent for exponent in range(allowed.bit_length())]
        return [size for size in powers if size < node] + [node * count for count in powers if node * count <= allowed]

    def max_gpus(self, allowed: int) -> int:
        """Return the largest of these numbers that divides the rows of a batch."""
        return max(gpus for gpus in self.gpu_counts(allowed) if self.rows % gpus == 0)

    def smallest(self, allowed: int, table_shards: Callable[[int], int]) -> Mesh | None:
        """Return the smallest mesh that the cell fits on, with the largest micro-batch that does; None without one."""
        for gpus in self.gpu_counts(allowed):
            shards = table_shards(gpus)
            if self.rows % gpus or any(width % shards for width in self.widths):
                continue
            for micro in self.micro_rows(gpus):
                if self.state_bytes(gpus, shards) > self.usable:
                    break
                mesh = self.mesh(gpus, shards, micro)
                if mesh.memory.peak <= self.usable:
                    return mesh
        return None

    def micro_rows(self, gpus: int) -> list[int]:
        """Return the rows of a micro-batch to try, largest first."""
        rows = self.cell.train.batch_rows // gpus
        if self.accumulate is not None:
            return [rows // self.accumulate]
        return [micro for micro in MICRO_ROWS if rows % micro == 0]

    def mesh(self, gpus: int, shards: int, micro: int) -> Mesh:
        """Return the cell on that many GPUs, whether or not it fits."""
        accumulate = self.cell.train.batch_rows // gpus // micro
        if micro not in self._parts:
            self._parts[micro] = self.tracer.parts(micro)
        memory = self._parts[micro].step(gpus, shards, accumulate, self.tables)
        return Mesh(gpus, shards, micro, accumulate, memory)

    def state_bytes(self, gpus: int, shards: int) -> float:
        """Return the bytes of weights, gradients and moments on one GPU, without row-wise gradients of tables."""
        return (4 * STATE_BYTES + self.tables.average) * self.rest / gpus + self._table_bytes(shards)

    def _table_bytes(self, shards: int) -> float:
        return 0.0 if self.tables.host else self.tables.persistent * self.values / shards

    def why(self, allowed: int) -> str:
        """State the memory per GPU on the largest allowed number of GPUs that divides the rows."""
        gpus = self.max_gpus(allowed)
        shards = self.over_nodes(gpus)
        mesh = self.mesh(gpus, shards, self.micro_rows(gpus)[-1])
        peak, table = mesh.memory.peak, self._table_bytes(shards)
        is_limit = gpus == max(self.gpu_counts(allowed))
        rows_limit = "" if is_limit else f" (the most that divide its {self.cell.train.batch_rows} rows)"
        return (
            f"on {gpus} GPUs{rows_limit}, each needs {peak / 1e9:.1f} GB and {self.usable / 1e9:.0f} GB are usable: "
            f"weights, gradients and moments take {(peak - mesh.memory.activations) / 1e9:.1f} GB (at least "
            f"{table / 1e9:.1f} GB for the table), with micro-batches of "
            f"{mesh.micro_rows} row{'s' * (mesh.micro_rows > 1)}"
        )
