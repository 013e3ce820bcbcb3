"""The memory that a single process needs to train a cell, which decides whether it can run on this machine."""

from __future__ import annotations

from suite.cells import Cell
from suite.models.accounting import meta_model
from suite.plan.activation_memory import PartCache, StepTracer
from suite.plan.table_state import table_state

PROCESS_BYTES = 600e6
"""Memory of a process before it builds a model: Python, torch and the other libraries."""
TRACED_ROWS = 256
"""Micro-batches of more rows are extrapolated from smaller ones, since parts that work in chunks take long to trace."""


def training_bytes(cell: Cell, vocabulary: int, parts: PartCache) -> float:
    """Predict the peak memory of a cell that one process trains.

    Args:
        cell: The cell.
        vocabulary: Entries of its vocabulary.
        parts: Parts of models traced earlier; new ones are added.

    Returns:
        Bytes, without those of the process itself.
    """
    tracer = StepTracer(meta_model(cell.model, vocabulary), cell.data.seq_len, cell.train.precision, cache=parts)

    def peak(rows: int) -> float:
        return tracer.parts(rows).step(1, 1, cell.train.accumulate, table_state(cell.train)).peak

    rows = cell.train.batch_rows // cell.train.accumulate
    if rows <= TRACED_ROWS:
        return peak(rows)
    largest = peak(TRACED_ROWS)
    per_row = (largest - peak(TRACED_ROWS // 2)) / (TRACED_ROWS - TRACED_ROWS // 2)
    return largest + per_row * (rows - TRACED_ROWS)
