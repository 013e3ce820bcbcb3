"""The death of a training process, without a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from suite.train.loop import Trainer


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """End the training within the block before it trains this step; the block must get that far."""
    train_step = Trainer.train_step

    def step_until_killed(trainer: Trainer) -> dict[str, float | None]:
        if trainer.step == step:
            raise Killed
        return train_step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_until_killed)
        with pytest.raises(Killed):
            yield
