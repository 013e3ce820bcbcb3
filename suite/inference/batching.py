"""Evaluation mode and precision, and batches under a budget of padded tokens, for scoring and generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from suite.errors import UserError
from suite.models.transformer import Transformer


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[torch.device]:
    """Run the model in evaluation mode without gradients, then restore its mode. Yields its device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute matrix products in a precision: "fp32" and "tf32" of fp32 tensors, "bf16" under autocast.

    Args:
        precision: One of these.
        device: Where the model is.

    Raises:
        UserError: The device has no tf32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"evaluate.precision: got tf32 on a {device.type.upper()}, allowed: fp32, bf16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def batches_of(order: Iterable[int], lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Divide rows into batches under a budget of padded tokens.

    Args:
        order: Row numbers, longest first.
        lengths: The length of each row.
        token_budget: Largest padded size of a batch; a longer row is a separate batch.

    Yields:
        The row numbers of each batch, in order.
    """
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
