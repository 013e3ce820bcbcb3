"""Bytes that a training step moves: of value tables in GPU memory, and of everything between GPUs."""

from __future__ import annotations

import math

from suite.cells import Cell
from suite.models.accounting import Account, cost_of
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.transformer import Transformer
from suite.plan.mesh import Mesh, sharded_elements
from suite.plan.step_memory import STATE_BYTES
from suite.plan.table_state import table_state

INDEX_AND_WEIGHT_BYTES = 8
"""Bytes per row that a token reads: an int32 index and an fp32 weight."""


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
    for table, reads in _reads_per_token(model):
        width = table.weight.shape[1]
        moved += width * (lookup * tokens * reads + update * _updated_rows(cell, table, tokens * reads))
    return moved


def link_bytes(model: Transformer, counted: Account, cell: Cell, mesh: Mesh) -> float:
    """Return the bytes that one GPU sends in a step.

    Sharded weights are gathered in every forward and backward pass, and their gradients are reduced once per
    micro-batch (bf16 weights where products are bf16, fp32 gradients). For tables, each read gathers the indices and
    weights of its group and sends back columns, forward and backward; replicas of a shard exchange the rows that have
    gradients.

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
        return 0.0
    weight_bytes = 2 if cell.train.precision == "bf16" else 4
    rest, _ = sharded_elements(model, counted)
    sent = mesh.accumulate * (gpus - 1) / gpus * rest * (2 * weight_bytes + 4)
    tokens, replicas = mesh.micro_rows * mesh.accumulate * cell.data.seq_len, gpus // shards
    for layer in model.memory_layers().values():
        columns = sum(table.weight.shape[1] for table in layer.tables)
        rows = _rows_read(layer) * len(layer.tables)
        sent += tokens * (shards - 1) * (rows * INDEX_AND_WEIGHT_BYTES + 2 * columns * 4 / shards)
    for table, reads in _reads_per_token(model):
        width = table.weight.shape[1]
        updated = _updated_rows(cell, table, tokens * shards * reads)
        sent += (replicas - 1) * 4 * updated * width / shards
    return sent


def _reads_per_token(model: Transformer) -> list[tuple[MemoryTable, float]]:
    """Return each table and the rows that one token reads from it, over all layers."""
    layers = model.memory_layers().values()
    return [
        (table, sum(_rows_read(layer) for layer in layers for read in layer.tables if read is table))
        for table in model.memory_tables()
    ]


def _rows_read(layer: MemoryLayer) -> float:
    """Return the rows that one token reads from each of the layer's tables."""
    widths = sum(table.weight.shape[1] for table in layer.tables)
    return cost_of("memory", layer).read.get("memory_values", 0) / widths


def _updated_rows(cell: Cell, table: MemoryTable, lookups: float) -> float:
    """Return how many rows have a gradient: those that uniform lookups reach, or all with dense gradients."""
    rows = len(table.weight)
    if not table.weight.requires_grad:
        return 0.0
    return rows * -math.expm1(-lookups / rows) if cell.train.table_optimizer != "dense" else rows
