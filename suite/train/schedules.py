"""Learning-rate schedules: the factor on the base rate at each step.

`wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) keeps the rate constant until a decay at the end, so
runs with several budgets are identical until the first of them starts to decay. `train.branches` lists the budgets, and
each run starts from a checkpoint in the stable phase of another. Its weights equal those of a run trained from scratch;
branching is therefore not part of a cell's identity.
"""

from __future__ import annotations

import math

from suite.cells import TrainConfig


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Compute the factor on every base rate.

    Linear warm-up over `config.warmup` steps, then constant, or a decay to `config.final_lr` at the last step: linear,
    cosine, or wsd (constant until `decay_start`). The rate of value tables is multiplied by the same factor, as in the
    released code.

    Args:
        config: The training configuration.
        step: The step, from 0.
        total_steps: All steps of the run.

    Returns:
        The factor.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        remaining = _remaining_decay(config, step, total_steps)
    else:
        progress = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
        remaining = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr + (1.0 - config.final_lr) * remaining


def _remaining_decay(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the remaining fraction of the decay: 1 in the stable phase, 0 at the last step.

    1-sqrt is 1 - sqrt(x), where x is the elapsed fraction of the decay (Hägele et al. 2024, arXiv 2405.18392).
    """
    start = decay_start(config, total_steps)
    elapsed = max(0, step + 1 - start) / (total_steps - start)
    return 1.0 - (elapsed if config.decay_shape == "linear" else math.sqrt(elapsed))


def decay_start(config: TrainConfig, total_steps: int) -> int:
    """Return the step at which the decay of wsd starts, a fraction `config.decay` of all steps before the end."""
    return total_steps - max(1, round(config.decay * total_steps))


def steps_of(config: TrainConfig, tokens: int, seq_len: int) -> int:
    """Compute the optimizer steps of a budget.

    Args:
        config: The training configuration.
        tokens: Training tokens, padding included.
        seq_len: Tokens per row.

    Returns:
        The number of steps, at least one.
    """
    return max(1, tokens // (config.batch_rows * seq_len))


def branch_steps(config: TrainConfig, seq_len: int) -> frozenset[int]:
    """Return the steps during this run at which the decay of a budget in `config.branches` starts, its own included."""
    if not config.branches:
        return frozenset()
    assert config.tokens is not None, "TrainConfig requires it with branches"
    starts = {tokens: decay_start(config, steps_of(config, tokens, seq_len)) for tokens in config.branches}
    return frozenset(start for start in starts.values() if 0 < start <= starts[config.tokens])
