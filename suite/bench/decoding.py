"""Decoding speed: milliseconds per step and tokens per second, by family, batch and table size.

The rows that a batch reads from a table are memory traffic that grows with the batch, while a dense layer reads its
weights once per batch, so the faster of the two depends on the batch and the table. The models take turns within every
round, so that other work on the machine slows all of them; ratios are to the dense model in the same round. The
models are untrained. With one CPU thread its CPU time is measured, which other processes hardly affect; otherwise
wall-clock time, and always if tables are elsewhere, since CPU time leaves out the wait for a file.

A model whose tables are elsewhere takes two turns in a round: warm, and cold, for which the pages of the file leave
memory and an LRU cache is emptied after the context is read. Shapes: B sequences.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from suite import models
from suite.baselines import checks
from suite.errors import UserError
from suite.inference.tables import popularity
from suite.inference.tables.loading import Place, add_caches, load_stored
from suite.inference.tables.reading import stored_rows, traffic
from suite.inference.tables.stores import SOURCES, Traffic
from suite.models import Transformer, registry
from suite.models.accounting import account
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

    Quantiles are over rounds. `clock` is `cpu` for the CPU time of one thread and `wall` for wall-clock time. `table`
    is where tables are, `model` for an ordinary model. The last fields are of tables elsewhere: the ratio of a cold
    turn to the warm one of its round, the share of distinct rows that the cache had, and bytes of rows per token by
    source.
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
    table: str = "model"
    cold_ratio_p50: float | None = None
    hits: float | None = None
    device_bytes_per_token: float | None = None
    host_bytes_per_token: float | None = None
    file_bytes_per_token: float | None = None


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
    configs: Sequence[ModelConfig],
    batches: Sequence[int],
    context: int = 64,
    steps: int = 16,
    rounds: int = 8,
    place: Place | None = None,
    folder: Path | None = None,
) -> list[DecodeSpeed]:
    """Measure every model at every batch size.

    Args:
        configs: The models, dense first.
        batches: Batch sizes, in sequences.
        context: Tokens in the cache when the measurement starts.
        steps: Decoding steps per round, of one token each.
        rounds: Rounds in which every model takes one turn.
        place: Where the tables of further models are, one for each model with tables; None: no such models.
        folder: The folder of temporary files with their tables; None: the system's.

    Returns:
        One speed per batch size and model, in this order; models with tables elsewhere come last.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = [(config, None) for config in configs]
    elsewhere = [(config, place) for config in configs if place is not None and config.has_tables]
    measured = []
    for batch in batches:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            contenders = [
                _Contender(
                    config, _built(config, device, at, Path(temporary) / f"{number}.pt"), at, batch, context, steps
                )
                for number, (config, at) in enumerate([*places, *elsewhere])
            ]
            clock = "wall" if elsewhere else _clock(device)
            for _ in track(range(rounds + 1), f"batch {batch}, {len(contenders)} models", console=Console(stderr=True)):
                for contender in contenders:
                    contender.take_turn(clock)
            dense = contenders[0].times()
            measured += [contender.result(dense, clock) for contender in contenders]
    return measured


class _Contender:
    """A model that takes turns, with its tables at a place; seconds of its turns, the first of which is a warm-up."""

    def __init__(
        self, config: ModelConfig, model: Transformer, place: Place | None, batch: int, context: int, steps: int
    ) -> None:
        self.config, self.model, self.place = config, model, place
        self.batch, self.context, self.steps = batch, context, steps
        self.warm: list[float] = []
        self.cold: list[float] = []
        self.read = Traffic()

    def take_turn(self, clock: str) -> None:
        """Decode once, and once more after the tables have left memory, if they can."""
        self.warm.append(self._seconds(clock, is_cold=False))
        if self.place is not None:
            self.cold.append(self._seconds(clock, is_cold=True))

    def times(self) -> np.ndarray:
        """Return the seconds per step of each warm turn."""
        return np.array(self.warm[1:]) / self.steps

    @torch.inference_mode()
    def _seconds(self, clock: str, is_cold: bool) -> float:
        """Return the seconds of the decoding steps; reading the context is not included."""
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(self.model.vocab_size, (self.batch, self.context), generator=generator).to(device)
        cache = self.model.new_cache(self.batch, self.context + self.steps + 1)
        token_B1 = self.model(tokens_BT, cache=cache)[:, -1:].argmax(-1)
        if is_cold:
            for rows in stored_rows(self.model):
                rows.store.evict()
        before = traffic(self.model)
        _wait(device)
        now = CLOCKS[clock]
        started = now()
        for _ in range(self.steps):
            token_B1 = self.model(token_B1, cache=cache)[:, -1:].argmax(-1)
        _wait(device)
        seconds = now() - started
        if not is_cold:
            self.read = traffic(self.model) - before
        return seconds

    def result(self, dense: np.ndarray, clock: str) -> DecodeSpeed:
        """Return the speed; `dense` holds the seconds per step of the dense model in the same rounds."""
        times, config, model = self.times(), self.config, self.model
        low, middle, high = (float(value) for value in np.quantile(times, QUANTILES))
        ratios = [round(float(value), 3) for value in np.quantile(times / dense, QUANTILES)]
        counted, device = account(config, model.vocab_size, self.context), next(model.parameters()).device
        half_keys = config.table_side
        return DecodeSpeed(
            family=config.family,
            base=config.base,
            half_keys=half_keys,
            memory_rows=(half_keys or 0) ** 2,
            batch=self.batch,
            context=self.context,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            clock=clock,
            ms_p20=round(low * 1e3, 4),
            ms_p50=round(middle * 1e3, 4),
            ms_p80=round(high * 1e3, 4),
            tokens_per_s=round(self.batch / middle, 1),
            time_ratio_p20=ratios[0],
            time_ratio_p50=ratios[1],
            time_ratio_p80=ratios[2],
            params_total=counted.params_total,
            bytes_per_token=counted.bytes_per_token,
            **self._of_tables(),
        )

    def _of_tables(self) -> dict[str, Any]:
        if self.place is None:
            return {}
        tokens = self.batch * self.steps
        return {
            "table": self.place.label,
            "cold_ratio_p50": round(float(np.median(np.array(self.cold[1:]) / np.array(self.warm[1:]))), 3),
            "hits": None if self.place.policy is None else round(self.read.hits / self.read.rows, 4),
            **{f"{source}_bytes_per_token": round(getattr(self.read, source) / tokens, 1) for source in SOURCES},
        }


def rows(speeds: Iterable[DecodeSpeed]) -> list[dict[str, object]]:
    """Return the speeds as records, one per model and batch."""
    return [asdict(speed) for speed in speeds]


def _built(config: ModelConfig, device: torch.device, place: Place | None, path: Path) -> Transformer:
    model = models.build(config, config.size.vocab_size or VOCAB, seed=0).eval()
    if place is None:
        return model.to(device)
    torch.save({"model": model.state_dict()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet cannot leave memory
    saved = torch.load(path, weights_only=True, mmap=True)["model"]
    stored = load_stored(config, model.vocab_size, saved, path, place=place)
    text = torch.randint(model.vocab_size, (16, 128), generator=torch.Generator().manual_seed(1))
    counts = popularity.counts(stored, [(text, torch.zeros_like(text))]) if place.policy == "static" else None
    add_caches(stored, place, counts)
    return stored.to(device)


def _clock(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
