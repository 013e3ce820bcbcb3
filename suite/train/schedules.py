"""Learning-rate schedules: the factor on the base rate at each step.

`wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) keeps the rate constant until a decay at the end, so
runs with several budgets are identical until the first of them starts to decay. `train.branches` lists the budgets, and
each run starts from the stable phase of another one that has come far enough. Its weights equal those of a run trained
from scratch, which is why branching is not part of a cell's identity.
"""

from __future__ import annotations

import math

from suite.cells import TrainConfig


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """The factor on every base rate at 0-based `step`.

    Linear warm-up over `config.warmup` steps, then constant, or a decay to `config.final_lr` at the last step: linear,
    cosine, or wsd (constant until `decay_start`). The rate of value tables is multiplied by the same factor, as in the
    released code.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        left = _left_of_decay(config, step, total_steps)
    else:
        progress = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
        left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr + (1.0 - config.final_lr) * left


def _left_of_decay(config: TrainConfig, step: int, total_steps: int) -> float:
    """Remaining fraction of the decay: 1 in the stable phase, 0 at the last step.

    1-sqrt is 1 - sqrt(x), where x is the elapsed fraction of the decay (Hägele et al. 2024, arXiv 2405.18392).
    """
    start = decay_start(config, total_steps)
    past = max(0, step + 1 - start) / (total_steps - start)
    return 1.0 - (past if config.decay_shape == "linear" else math.sqrt(past))


def decay_start(config: TrainConfig, total_steps: int) -> int:
    """wsd: the step at which the decay starts, a fraction `config.decay` of all steps before the end."""
    return total_steps - max(1, round(config.decay * total_steps))


def steps_of(config: TrainConfig, tokens: int, seq_len: int) -> int:
    """Optimizer steps for a budget of tokens (padding included), at least one."""
    return max(1, tokens // (config.batch_rows * seq_len))


def branch_steps(config: TrainConfig, seq_len: int) -> frozenset[int]:
    """The steps at which the decay of a budget in `config.branches`, this run's included, starts during this run."""
    if not config.branches:
        return frozenset()
    assert config.tokens is not None, "TrainConfig requires it with branches"
    starts = {tokens: decay_start(config, steps_of(config, tokens, seq_len)) for tokens in config.branches}
    return frozenset(start for start in starts.values() if 0 < start <= starts[config.tokens])
