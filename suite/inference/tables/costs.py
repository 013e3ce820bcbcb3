"""What a token reads of the tables of a cell, in the form in which its run stores them."""

from __future__ import annotations

import functools

import torch

from suite.cells import Cell
from suite.inference.tables.forms import row_bytes
from suite.models.accounting import Account, account_of, table_bytes
from suite.models.transformer import Transformer


def account_of_cell(cell: Cell, model: Transformer) -> Account:
    """Count the model of a cell; rows of tables are in bf16, as all weights, or in the form of a quantised run."""
    form = cell.quantised or "bf16"
    return account_of(model, cell.data.seq_len, functools.partial(row_bytes, form, dtype=torch.float32))


def bytes_by_source(cell: Cell, model: Transformer, table: str | None) -> dict[str, float]:
    """Return the bytes that decoding one token of one sequence reads from the device, the host and the file.

    Rows outside of the device are read in the dtype in which training stored them, or in the form of a quantised run.

    Args:
        cell: The cell.
        model: Its model, on any device.
        table: Where tables are: `host` or `file`; None: on the device.

    Returns:
        {"device", "host", "file"}; "device" alone is the account's `bytes_per_token` if the tables are there.
    """
    total = account_of_cell(cell, model).bytes_per_token
    read = {"device": total, "host": 0.0, "file": 0.0}
    if table is not None:
        dtype = torch.float32 if cell.train.value_precision == "fp32" else torch.bfloat16
        of_row = functools.partial(row_bytes, cell.quantised or "bf16", dtype=dtype)
        read["device"] -= table_bytes(model, of_row)
        read[table] = table_bytes(model, functools.partial(row_bytes, cell.quantised, dtype=dtype))
    return read
