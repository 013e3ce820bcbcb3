"""The average of a model's weights over the latest part of training, which probes measure next to the weights.

The weights of a run at a constant learning rate scatter around their course; an average of recent weights does not
(Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407). A fixed horizon would lag behind by a fixed number
of steps, which delays fast learners more than slow ones. Here the horizon grows with the step (power functions of
Karras et al. 2024, arXiv 2312.02696): after n snapshots the m-th has a weight of about m^(1 / share - 2), so the mean
age of the averaged weights is the same share of the training so far for every n. A delay by a constant factor cancels
in ratios of exposures. The first snapshot alone is the first average, so nothing needs a correction at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from suite.train.optim import Optimizer

SPACING = 4
"""Steps between snapshots. Each flushes the tables, so that the rows that were not read since the last one count with
the values that dense AdamW gives them."""


class WeightAverage:
    """The average of the trained parameters and of the floating-point statistics that a model saves, in their dtype.

    Statistics, such as the running moments of a batch norm, are averaged like weights and not computed anew.

    Args:
        model: The model in training.
        optimizer: Its optimizer, which brings tables up to date.
        share: Mean age of the averaged weights as a share of the steps taken; 0.5 is the plain mean of all snapshots.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, share: float) -> None:
        self.optimizer, self.share = optimizer, share
        saved = model.state_dict().keys()
        statistics = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in optimizer.parameters.items()}
        self.weights |= {name: buffer for name, buffer in statistics.items() if buffer.is_floating_point()}
        self.tensors = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take a snapshot if one is due after this many steps, at least 1."""
        if (step - 1) % SPACING:
            return
        self.optimizer.flush()
        retained = decay(1 + (step - 1) // SPACING, self.share)
        for name, weight in self.weights.items():
            self.tensors[name].lerp_(weight, 1 - retained)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Exchange the model's weights for their average within the context, and restore them bit for bit."""
        self.optimizer.flush()  # otherwise the next read of a row would apply missed updates to its average
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self.weights.items():
            held = weight.clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(held)


def decay(snapshot: int, share: float) -> float:
    """Return the factor on the earlier average when this snapshot, from 1, enters it; 0 for the first."""
    return float((1 - 1 / snapshot) ** (1 / share - 1))
