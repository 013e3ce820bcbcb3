"""Bytes that a training step moves: of value tables in GPU memory, and of everything between GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from suite.cells import Cell
from suite.models.accounting import Account, reads_per_token, rows_read
from suite.models.memory_table import MemoryTable
from suite.models.precision import holds_matrices_only
from suite.models.transformer import Transformer
from suite.plan.gpus import Gpu
from suite.plan.mesh import Mesh, sharded_elements
from suite.plan.step_memory import STATE_BYTES, exchanged_rows
from suite.plan.table_state import table_state

INDEX_AND_WEIGHT_BYTES = 12
"""Bytes per row that a token reads: an int32 index, an fp32 weight and its fp32 gradient."""


def table_bytes(model: Transformer, cell: Cell) -> float:
    """Return the bytes of tables that a step moves in the memory of all GPUs together.

    Forward: every row that is read. Backward: the same rows again for the gradients of scores, and gradient rows (fp32)
    read and written. Optimizer, on the rows that have gradients: weights, moments and fp32 copies read and written,
    gradients read and cleared.
    """
    tokens, state = cell.train.batch_rows * cell.data.seq_len, table_state(cell.train)
    lookup = 2 * state.value + 2 * STATE_BYTES
    update = 2 * (state.value + state.moments) + 2 * STATE_BYTES
    moved = 0.0
    for table, reads in reads_per_token(model):
        width = table.weight.shape[1]
        moved += width * (lookup * tokens * reads + update * _updated_rows(cell, table, tokens * reads))
    return moved


@dataclass(frozen=True)
class Sent:
    """Bytes that one GPU sends in a step.

    Attributes:
        weights: Sharded weights, gathered for every pass, and their gradients.
        columns: Reads of tables within a group that divides their columns.
        replicas: Gradients of tables, summed over groups.
    """

    weights: float = 0.0
    columns: float = 0.0
    replicas: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.columns + self.replicas

    def seconds(self, compute_s: float, mesh: Mesh, gpu: Gpu) -> float:
        """Return the time of a step that computes for `compute_s` seconds.

        Weights are gathered while other blocks compute, so that the longer of both counts; computation waits for what
        tables send. Within a node GPUs use NVLink, otherwise the network.

        Args:
            compute_s: Seconds of computing per step.
            mesh: The mesh.
            gpu: The GPU.
        """
        every, group = (gpu.link if gpus <= gpu.per_node else gpu.network for gpus in (mesh.gpus, mesh.table_shards))
        return max(compute_s, self.weights / every) + self.columns / group + self.replicas / every


def sent_bytes(model: Transformer, counted: Account, cell: Cell, mesh: Mesh) -> Sent:
    """Return the bytes that one GPU sends in a step.

    Sharded weights are gathered in every forward and backward pass (those outside blocks once for both), and their
    gradients are reduced once per micro-batch, in fp32; where products are bf16, modules that hold only matrices are
    gathered in bf16. For tables, each read gathers the indices and weights of its group and sends back columns, forward
    and backward. Replicas of a shard sum their gradients by an all-reduce over places for all lookups, or over the
    whole table if there are at least half as many as rows.

    Args:
        model: The cell's model, on any device.
        counted: Its account.
        cell: The cell.
        mesh: The GPUs it runs on.

    Returns:
        Bytes, 0 for a single GPU.
    """
    gpus, shards = mesh.gpus, mesh.table_shards
    if gpus == 1:
        return Sent()
    rest, _ = sharded_elements(model, counted)
    narrow = _bf16_elements(model) if cell.train.precision == "bf16" else 0
    passes = 2 * (4 * rest - 2 * narrow) - 4 * _root_elements(model)
    weights = mesh.accumulate * (gpus - 1) / gpus * (passes + 4 * rest)
    tokens, columns, replicas = mesh.micro_rows * mesh.accumulate * cell.data.seq_len, 0.0, 0.0
    for layer in model.memory_layers().values():
        width = sum(table.weight.shape[1] for table in layer.tables)
        rows = rows_read(layer) * len(layer.tables)
        columns += tokens * (shards - 1) * (rows * INDEX_AND_WEIGHT_BYTES + 2 * width * 4 / shards)
    for table, reads in reads_per_token(model):
        row_bytes = STATE_BYTES * table.weight.shape[1] / shards
        is_row_wise, rows = table_state(cell.train).row_wise, len(table.weight)
        trained = rows if table.weight.requires_grad else 0
        summed = exchanged_rows(trained, tokens * gpus * reads) if is_row_wise else trained
        flags = trained if is_row_wise else 0
        replicas += 2 * (1 - shards / gpus) * (summed * row_bytes + flags)
    return Sent(weights, columns, replicas)


def _root_elements(model: Transformer) -> int:
    """Return the elements of embedding, last norm and output matrix, which one gathering serves for both passes."""
    parts = (model.embedding, model.norm, model.output)
    return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())


def _bf16_elements(model: Transformer) -> int:
    """Return the elements of the modules that are gathered in bf16 where products are bf16 (train/sharding.py)."""
    modules = [module for layer in model.layers for module in layer.modules() if holds_matrices_only(module)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _updated_rows(cell: Cell, table: MemoryTable, lookups: float) -> float:
    """Return how many rows have a gradient: those that uniform lookups reach, or all with dense gradients."""
    rows = len(table.weight)
    if not table.weight.requires_grad:
        return 0.0
    return rows * -math.expm1(-lookups / rows) if cell.train.table_optimizer != "dense" else rows
