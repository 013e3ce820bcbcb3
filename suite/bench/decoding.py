"""Decoding speed: milliseconds per step and tokens per second, by family, batch and table size.

The rows that a batch reads from a table are memory traffic that grows with the batch, while a dense layer reads its
weights once per batch, so the faster of the two depends on the batch and the table. The models take turns within every
round, so that other work on the machine slows all of them; ratios are to the dense model in the same round. The
models are untrained. With one CPU thread its CPU time is measured, which other processes hardly affect; otherwise
wall-clock time. Shapes: B sequences.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from suite import models
from suite.baselines import checks
from suite.errors import UserError
from suite.models import Transformer, registry
from suite.models.accounting import account_of
from suite.models.registry import ModelConfig
from suite.models.sizes import SIZES
from suite.yaml_input import explain

VOCAB = 4096
"""Size of the vocabulary for bases that do not define one."""
QUANTILES = (0.2, 0.5, 0.8)
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class DecodeSpeed:
    """One model at one batch: milliseconds per decoding step, tokens per second, and the ratio of times to dense.

    Quantiles are over rounds. `clock` is `cpu` for the CPU time of one thread and `wall` for wall-clock time.
    """

    family: str
    base: str
    half_keys: int | None
    memory_rows: int
    batch: int
    context: int
    device: str
    threads: int
    clock: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    tokens_per_s: float
    time_ratio_p20: float
    time_ratio_p50: float
    time_ratio_p80: float
    params_total: int
    bytes_per_token: float


def configurations(base: str, half_keys: Iterable[int]) -> list[ModelConfig]:
    """Return every registered family at the base, dense first; families with product keys once per table size.

    Raises:
        UserError: The base is unknown, a family cannot have a table of this size, or a baseline is invalid or has
            required options.
    """
    if base not in SIZES:
        raise UserError(f"--base: got {base!r}, allowed: {', '.join(SIZES)}")
    configs = []
    for name in sorted(registry.families(), key=lambda name: name != "dense"):
        options = registry.family(name).config
        sides: list[dict[str, int]] = (
            [{"half_keys": n} for n in half_keys] if "half_keys" in options.model_fields else [{}]
        )
        for side in sides:
            fields = {"family": name, "base": base, **side}
            try:
                config = options.model_validate(fields)
            except ValidationError as error:
                raise UserError(f"family {name}: {explain(error, options, fields)}") from None
            for field, value, allowed in config.problems():
                raise UserError(f"--half-keys: {name}: {field}: got {value!r}, allowed: {allowed}")
            if registry.family(name).source:
                checks.check(config)
            configs.append(config)
    return configs


def decode_speeds(
    configs: Sequence[ModelConfig], batches: Sequence[int], context: int = 64, steps: int = 16, rounds: int = 8
) -> list[DecodeSpeed]:
    """Measure every model at every batch size.

    Args:
        configs: The models, dense first.
        batches: Batch sizes, in sequences.
        context: Tokens in the cache when the measurement starts.
        steps: Decoding steps per round, of one token each.
        rounds: Rounds in which every model takes one turn.

    Returns:
        One speed per batch size and model, in this order.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = []
    for batch in batches:
        built = [_built(config, device) for config in configs]
        turns = track(range(rounds + 1), f"batch {batch}, {len(built)} models", console=Console(stderr=True))
        seconds = [[_seconds(model, batch, context, steps) for model in built] for _ in turns]
        times = np.array(seconds[1:]) / steps  # the first round is a warm-up
        for index, (config, model) in enumerate(zip(configs, built, strict=True)):
            measured.append(_result(config, model, batch, context, times[:, index], times[:, 0]))
    return measured


def rows(speeds: Iterable[DecodeSpeed]) -> list[dict[str, object]]:
    """Return the speeds as records, one per model and batch."""
    return [asdict(speed) for speed in speeds]


def _built(config: ModelConfig, device: torch.device) -> Transformer:
    return models.build(config, config.size.vocab_size or VOCAB, seed=0).to(device).eval()


@torch.inference_mode()
def _seconds(model: Transformer, batch: int, context: int, steps: int) -> float:
    """Return the seconds of `steps` decoding steps; reading the context is not included."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.vocab_size, (batch, context), generator=generator).to(device)
    cache = model.new_cache(batch, context + steps + 1)
    token_B1 = model(tokens_BT, cache=cache)[:, -1:].argmax(-1)
    _wait(device)
    clock = CLOCKS[_clock(device)]
    started = clock()
    for _ in range(steps):
        token_B1 = model(token_B1, cache=cache)[:, -1:].argmax(-1)
    _wait(device)
    return clock() - started


def _clock(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _result(
    config: ModelConfig, model: Transformer, batch: int, context: int, times: np.ndarray, dense: np.ndarray
) -> DecodeSpeed:
    low, middle, high = (float(value) for value in np.quantile(times, QUANTILES))
    ratios = [round(float(value), 3) for value in np.quantile(times / dense, QUANTILES)]
    counted, device = account_of(model, context), next(model.parameters()).device
    half_keys = config.table_side
    return DecodeSpeed(
        family=config.family,
        base=config.base,
        half_keys=half_keys,
        memory_rows=(half_keys or 0) ** 2,
        batch=batch,
        context=context,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        clock=_clock(device),
        ms_p20=round(low * 1e3, 4),
        ms_p50=round(middle * 1e3, 4),
        ms_p80=round(high * 1e3, 4),
        tokens_per_s=round(batch / middle, 1),
        time_ratio_p20=ratios[0],
        time_ratio_p50=ratios[1],
        time_ratio_p80=ratios[2],
        params_total=counted.params_total,
        bytes_per_token=counted.bytes_per_token,
    )
