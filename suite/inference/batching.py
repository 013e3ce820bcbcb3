"""Evaluation mode, and batches under a budget of padded tokens, for scoring and generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

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
