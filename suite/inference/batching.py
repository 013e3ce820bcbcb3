"""What scoring and generation share: evaluation mode, and batches under a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from suite.models.transformer import Transformer


@contextmanager
def evaluation_mode(model: Transformer) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the model's mode is restored at the end. Yields its device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def batches_of(order: Iterable[int], lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Consecutive groups of `order` (longest first) whose padded size is within the budget; a longer row goes alone."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
