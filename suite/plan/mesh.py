"""The fewest GPUs a cell fits on, and how its table and rows are divided among them.

The sharding is the one training has: weights, gradients and moments of the rest divided among all GPUs, tables by
columns among those of a node (over nodes where that takes fewer GPUs), rows of a batch among all, in micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from suite.cells import Cell
from suite.models.accounting import Account
from suite.models.transformer import Transformer
from suite.plan.activation_memory import Seen, parts
from suite.plan.gpus import USABLE, Gpu
from suite.plan.step_memory import STATE_BYTES, Parts, StepMemory
from suite.plan.table_state import table_state

MICRO_ROWS = (8, 4, 2, 1)
"""Rows of a micro-batch that are tried; the released template's is the largest."""
MOST_NODES = 512


@dataclass(frozen=True)
class Mesh:
    """A cell on some GPUs: how its table and rows are divided, and the bytes each GPU needs."""

    gpus: int
    table_shards: int
    micro_rows: int
    accumulate: int
    memory: StepMemory


@dataclass(frozen=True)
class Unfit:
    """Why a cell fits on no mesh there is, and what would make it fit."""

    why: str
    would_fit: str


def smallest_mesh(
    cell: Cell, model: Transformer, counted: Account, gpu: Gpu, nodes: int | None, seen: Seen
) -> Mesh | Unfit:
    """The fewest GPUs on which the cell fits, with the largest micro-batch that does; `nodes` None: any number.

    `model` lies on the meta device, and `counted` is its account.
    """
    meshes, allowed = _Meshes(cell, model, counted, gpu, seen), (nodes or MOST_NODES) * gpu.per_node
    ways = (meshes.within_nodes, meshes.over_nodes)
    found = [mesh for way in ways if (mesh := meshes.smallest(allowed, way)) is not None]
    if found:
        return min(found, key=lambda mesh: mesh.gpus)
    more = meshes.smallest(MOST_NODES * gpu.per_node, meshes.over_nodes)
    if more is not None:
        return Unfit(meshes.why(allowed), f"{more.gpus} GPUs ({-(-more.gpus // gpu.per_node)} nodes)")
    ways_out = ["a shorter row (data.seq_len)", "a GPU with more memory"]
    if meshes.most(allowed) < max(meshes.numbers(allowed)):
        ways_out.insert(0, "a train.batch_rows that more GPUs divide")
    if cell.train.value_second_moment == "row":
        ways_out.insert(0, "train.value_second_moment: element, whose tables are divided")
    return Unfit(meshes.why(allowed), " or ".join(ways_out))


def divided(model: Transformer, counted: Account) -> tuple[int, int]:
    """Parameters outside tables, and the values in them, which are divided by columns."""
    values = sum(table.weight.numel() for table in model.memory_tables())
    return counted.params_total - values, values


class _Meshes:
    """The ways to divide a cell among GPUs of one kind. Its parts are traced once for every micro-batch tried."""

    def __init__(self, cell: Cell, model: Transformer, counted: Account, gpu: Gpu, seen: Seen) -> None:
        self.cell, self.model, self.gpu, self.seen = cell, model, gpu, seen
        self.usable, self.tables = gpu.memory * USABLE, table_state(cell.train)
        self.rest, self.values = divided(model, counted)
        self.widths = {table.weight.shape[1] for table in model.memory_tables()}
        # Queries that are normed over a micro-batch keep the cell's number of them.
        self.accumulate = cell.train.accumulate if getattr(cell.model, "query_batchnorm", False) else None
        self.rows = cell.train.batch_rows // (self.accumulate or 1)
        self._parts: dict[int, Parts] = {}

    def within_nodes(self, gpus: int) -> int:
        """How many divide the columns of tables, among the GPUs of a node."""
        return min(self.over_nodes(gpus), self.gpu.per_node)

    def over_nodes(self, gpus: int) -> int:
        """How many divide the columns of tables, among all GPUs; none where a row's moment is of all its columns."""
        return 1 if self.cell.train.value_second_moment == "row" else gpus

    def numbers(self, allowed: int) -> list[int]:
        """GPUs that can be had, up to `allowed`: powers of two of one node, of whole nodes beyond."""
        node, powers = self.gpu.per_node, [2**exponent for exponent in range(allowed.bit_length())]
        return [size for size in powers if size < node] + [node * count for count in powers if node * count <= allowed]

    def most(self, allowed: int) -> int:
        """The most of them that divide the rows of a batch."""
        return max(gpus for gpus in self.numbers(allowed) if self.rows % gpus == 0)

    def smallest(self, allowed: int, table_shards: Callable[[int], int]) -> Mesh | None:
        """The fewest GPUs on which the cell fits, with the largest micro-batch that does."""
        for gpus in self.numbers(allowed):
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
        """Rows of a micro-batch to be tried, most first."""
        rows = self.cell.train.batch_rows // gpus
        if self.accumulate is not None:
            return [rows // self.accumulate]
        return [micro for micro in MICRO_ROWS if rows % micro == 0]

    def mesh(self, gpus: int, shards: int, micro: int) -> Mesh:
        """The cell on that many GPUs, fit or not."""
        accumulate = self.cell.train.batch_rows // gpus // micro
        if micro not in self._parts:
            data, precision = self.cell.data, self.cell.train.precision
            self._parts[micro] = parts(self.model, data.seq_len, micro, precision, seen=self.seen)
        memory = self._parts[micro].step(gpus, shards, accumulate, self.tables)
        return Mesh(gpus, shards, micro, accumulate, memory)

    def state_bytes(self, gpus: int, shards: int) -> float:
        """Of weights, gradients and moments on one GPU; row-wise gradients of tables left out."""
        return 4 * STATE_BYTES * self.rest / gpus + self.tables.kept * self.values / shards

    def why(self, allowed: int) -> str:
        """What a GPU would need where all are used that there are, or that divide the rows."""
        gpus = self.most(allowed)
        shards = self.over_nodes(gpus)
        mesh = self.mesh(gpus, shards, self.micro_rows(gpus)[-1])
        peak, table = mesh.memory.peak, self.tables.kept * self.values / shards
        all_there_are = gpus == max(self.numbers(allowed))
        limit = "" if all_there_are else f" (no more divide its {self.cell.train.batch_rows} rows)"
        return (
            f"on {gpus} GPUs{limit} a GPU needs {peak / 1e9:.1f} of {self.usable / 1e9:.0f} GB (usable): weights, "
            f"gradients and moments {(peak - mesh.memory.activations) / 1e9:.1f} GB, the table's at least "
            f"{table / 1e9:.1f} GB of them, and micro-batches of {mesh.micro_rows} row{'s' * (mesh.micro_rows > 1)}"
        )
