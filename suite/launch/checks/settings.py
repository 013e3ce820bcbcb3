"""Settings that are valid on their own, but do not suit the length or the data of a run."""

from __future__ import annotations

from suite.cells import Cell
from suite.errors import UserError
from suite.train.schedules import steps_of

MAX_ROWS = 2**63
"""Rows are numbered in int64."""


def refuse_unfit_settings(cell: Cell, steps: int | None = None) -> None:
    """Raise UserError for more rows than an int64 counts, a warm-up longer than the run, or a stopping rule without
    probes of bits.

    Args:
        cell: The cell.
        steps: Its optimizer steps; None: known only if `train.tokens` is set.
    """
    if steps is None and cell.train.tokens is not None:
        steps = steps_of(cell.train, cell.train.tokens, cell.data.seq_len)
    if steps is not None and steps * cell.train.batch_rows >= MAX_ROWS:
        raise UserError(
            f"cell {cell.run_name}: train.epochs: got {cell.train.epochs}, which are {steps:.0e} steps of "
            f"{cell.train.batch_rows} rows, allowed: fewer than 2^63 rows in all"
        )
    if steps is not None and cell.train.warmup > steps:
        raise UserError(
            f"cell {cell.run_name}: train.warmup: got {cell.train.warmup}, allowed: at most {steps}, the steps of the "
            "run; a longer warm-up never reaches the learning rate"
        )
    if cell.train.stop_past is not None and not cell.train.probes:
        raise UserError(
            f"cell {cell.run_name}: train.stop_past: got {cell.train.stop_past}, allowed: null without train.probes, "
            "which measure the bits learned"
        )
    if cell.train.stop_past is not None and cell.data.kind != "bios":
        raise UserError(
            f"cell {cell.run_name}: train.stop_past: got {cell.train.stop_past}, allowed: null with data.kind "
            f"{cell.data.kind}, which has no bits to learn"
        )


def refuse_tf32_without_gpu(cell: Cell) -> None:
    """Raise UserError for evaluations in tf32 if this process has no GPU; called before it trains."""
    import torch  # a launcher, which has other devices than its workers, need not load it

    if not torch.cuda.is_available() and any(config.precision == "tf32" for config in cell.evaluate):
        raise UserError(f"cell {cell.run_name}: evaluate.precision: got 'tf32' on a CPU, allowed: 'fp32', 'bf16'")
