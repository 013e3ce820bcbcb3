"""The memory that a process needs to train a cell, which decides whether it can run on this machine."""

from __future__ import annotations

from typing import Literal

import torch

from suite.cells import Cell
from suite.models.accounting import meta_model
from suite.plan.activation_memory import PartCache, StepTracer
from suite.plan.gpus import GPUS
from suite.plan.table_state import table_state

Where = Literal["whole", "peak", "host"]
"""The memory of a process whose device is the CPU, that of the device, or that of the host for tables: fields of
StepMemory."""
PROCESS_BYTES = 600e6
"""Memory of a process before it builds a model: Python, torch and the other libraries."""
TRACED_ROWS = 256
"""Micro-batches of more rows are extrapolated from smaller ones, since parts that work in chunks take long to trace."""


def _capability() -> int:
    """Return the major compute capability of this machine's GPU, or of the latest that plans know."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0]
    return max(gpu.capability for gpu in GPUS.values())


def training_bytes(
    cell: Cell,
    vocabulary: int,
    parts: PartCache,
    processes: int = 1,
    memory_parallel: int = 1,
    where: Where = "whole",
) -> float:
    """Predict the peak memory of a process that trains a cell, alone or with others.

    Args:
        cell: The cell.
        vocabulary: Entries of its vocabulary.
        parts: Parts of models traced earlier; new ones are added.
        processes: Processes that train the cell together.
        memory_parallel: How many of them share the columns of each table.
        where: Which memory.

    Returns:
        Bytes, without those of the process itself.
    """
    model, seq_len, precision = meta_model(cell.model, vocabulary), cell.data.seq_len, cell.train.precision
    tracer = StepTracer(model, seq_len, precision, cache=parts, capability=None if where == "whole" else _capability())
    state = table_state(cell.train, on_gpu=where != "whole")

    def peak(rows: int) -> float:
        step = tracer.parts(rows).step(processes, memory_parallel, cell.train.accumulate, state)
        needed: float = getattr(step, where)
        return needed

    rows = max(1, cell.train.batch_rows // cell.train.accumulate // processes)
    if rows <= TRACED_ROWS:
        return peak(rows)
    largest = peak(TRACED_ROWS)
    per_row = (largest - peak(TRACED_ROWS // 2)) / (TRACED_ROWS - TRACED_ROWS // 2)
    return largest + per_row * (rows - TRACED_ROWS)
