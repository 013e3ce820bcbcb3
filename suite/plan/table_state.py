"""Bytes of a value table, of its optimizer state and of its average under the options of a cell (docs/training.md)."""

from __future__ import annotations

from dataclasses import replace

from suite.cells import TrainConfig
from suite.plan.step_memory import STATE_BYTES, TableState


def table_state(config: TrainConfig, on_gpu: bool = False) -> TableState:
    """Return the bytes that training stores per value and per row of a table and per value of an average, and where.

    `on_gpu`: whether the model is trained on a GPU rather than on a CPU.
    """
    stored, on_host = _bytes(config), config.table_device == "host"
    average = 0 if config.probe_average is None else STATE_BYTES
    return replace(stored, host=on_host, average=average, places=on_gpu and stored.row_wise and not on_host)


def _bytes(config: TrainConfig) -> TableState:
    if config.table_optimizer == "dense":
        return TableState(row_wise=False, row=0)
    if config.table_optimizer == "sgd":
        return TableState(moments=0, row=1)
    value = STATE_BYTES if config.value_precision == "fp32" else 2
    copy = STATE_BYTES if config.value_precision == "bf16_master" else 0
    by_row = config.value_second_moment == "row"
    return TableState(
        value=value,
        moments=(1 if by_row else 2) * STATE_BYTES + copy,
        row=TableState.row + (STATE_BYTES if by_row else 0),
    )
