"""Decoding speed: milliseconds per step and tokens per second, by family, batch and table size.

The rows that a batch reads from a table are memory traffic that grows with the batch, while a dense layer reads its
weights once per batch, so the faster of the two depends on the batch and the table. The models take turns within every
round, so that other work on the machine slows all of them; ratios are to the dense model in the same round. The
models are untrained. With one CPU thread its CPU time is measured, which other processes hardly affect; otherwise
wall-clock time, and always if tables are elsewhere, since CPU time leaves out the wait for a file.

Models with tables are also measured with quantised rows. A model whose tables are elsewhere takes two turns in a round:
warm, and cold, for which the pages of the file leave memory and an LRU cache is emptied after the context is read. If
its rows follow from token ids, it is measured with and without prefetching them. Shapes: B sequences.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from suite import models
from suite.baselines import checks
from suite.errors import UserError
from suite.inference.tables import popularity
from suite.inference.tables.forms import row_bytes
from suite.inference.tables.loading import Place, add_caches, load_stored
from suite.inference.tables.prefetch import rows_follow_ids
from suite.inference.tables.reading import reduce_tables, stored_rows, traffic
from suite.inference.tables.stores import SOURCES, Traffic
from suite.models import Transformer, registry
from suite.models.accounting import account_of, meta_model
from suite.models.memory_table import RowForm
from suite.models.registry import ModelConfig
from suite.models.sizes import SIZES
from suite.train.reporting.telemetry import shows_progress
from suite.yaml_input import explain

T = TypeVar("T")
VOCAB = 4096
"""Size of the vocabulary for bases that do not define one."""
QUANTILES = (0.2, 0.5, 0.8)
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class DecodeSpeed:
    """One model at one batch: milliseconds per decoding step, tokens per second, and the ratio of times to dense.

    Quantiles are over rounds. `clock` is `cpu` for the CPU time of one thread and `wall` for wall-clock time. `table`
    is where tables are, `model` for an ordinary model, and `form` the form of their rows, None for fp32. The last
    fields are of tables elsewhere, and bytes also of quantised ones: the ratio of a cold turn to the warm one of its
    round, the share of distinct rows that the cache had, bytes of rows per token by source, and microseconds per token
    in which layers waited for rows, in warm and cold turns (medians). The ratios of a model that prefetches are medians
    of its time, or its wait, over that of the same model without prefetching in the same round.
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
    form: str | None = None
    cold_ratio_p50: float | None = None
    hits: float | None = None
    device_bytes_per_token: float | None = None
    host_bytes_per_token: float | None = None
    file_bytes_per_token: float | None = None
    wait_us_per_token: float | None = None
    cold_wait_us_per_token: float | None = None
    prefetch_time_ratio: float | None = None
    cold_prefetch_time_ratio: float | None = None
    prefetch_wait_ratio: float | None = None
    cold_prefetch_wait_ratio: float | None = None


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
    forms: Sequence[RowForm] = (),
) -> list[DecodeSpeed]:
    """Measure every model at every batch size.

    Args:
        configs: The models, dense first.
        batches: Batch sizes, in sequences.
        context: Tokens in the cache when the measurement starts.
        steps: Decoding steps per round, of one token each.
        rounds: Rounds in which every model takes one turn.
        place: Where the tables of further models are, one for each model with tables and each form, and one more that
            prefetches if its rows follow from token ids; None: no such models.
        folder: The folder of temporary files with their tables; None: the system's.
        forms: Forms of the rows of further models, in the model's memory and at the place; none: fp32 at the place.

    Returns:
        One speed per batch size and model, in this order; models with tables elsewhere come last.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain: list[tuple[ModelConfig, Place | None, RowForm | None]] = [(config, None, None) for config in configs]
    smaller = [(config, None, form) for config in configs if config.has_tables for form in forms]
    elsewhere = [
        (config, at, form)
        for config in configs
        for form in (forms or (None,))
        for at in ([] if place is None else _places(config, place))
    ]
    clock = "wall" if elsewhere else _clock(device)
    measured = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = [
            (config, _built(config, device, at, form, Path(temporary) / f"{number}.pt"), at, form)
            for number, (config, at, form) in enumerate(_tracked([*plain, *smaller, *elsewhere], "making models"))
        ]
        for batch in batches:
            contenders = [_Contender(*each, batch, context, steps) for each in built]
            for _ in _tracked(range(rounds + 1), f"batch {batch}, {len(contenders)} models"):
                for contender in contenders:
                    contender.take_turn(clock)
            without = {each.table: each for each in contenders if each.place == place}
            measured += [each.result(contenders[0], clock, without.get(each.table)) for each in contenders]
    return measured


def _tracked(items: Sequence[T], title: str) -> Iterable[T]:
    """Return the items; a terminal shows how many were taken, if rich is installed."""
    if not shows_progress():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True))


class _Contender:
    """A model that takes turns, with its tables at a place: seconds of each turn, and what it read of stored tables."""

    def __init__(
        self,
        config: ModelConfig,
        model: Transformer,
        place: Place | None,
        form: RowForm | None,
        batch: int,
        context: int,
        steps: int,
    ) -> None:
        self.config, self.model, self.place, self.form = config, model, place, form
        self.table = id(config), form
        self.batch, self.context, self.steps = batch, context, steps
        self.turns: dict[bool, list[tuple[float, Traffic]]] = {False: [], True: []}

    def take_turn(self, clock: str) -> None:
        """Decode once, and once more after the tables have left memory, if they can."""
        for is_cold in (False, True) if self.place is not None else (False,):
            self.turns[is_cold].append(self._turn(clock, is_cold))

    def times(self, is_cold: bool = False) -> np.ndarray:
        """Return the seconds per step of each turn but the first, which is a warm-up."""
        return np.array([seconds for seconds, _ in self.turns[is_cold][1:]]) / self.steps

    def waits(self, is_cold: bool) -> np.ndarray:
        """Return the seconds per step in which layers waited for rows, in each turn but the first."""
        return np.array([read.wait_s for _, read in self.turns[is_cold][1:]]) / self.steps

    @torch.inference_mode()
    def _turn(self, clock: str, is_cold: bool) -> tuple[float, Traffic]:
        """Return the seconds and the reads of the decoding steps; reading the context is not included."""
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
        return now() - started, traffic(self.model) - before

    def result(self, dense: _Contender, clock: str, without: _Contender | None) -> DecodeSpeed:
        """Return the speed.

        Args:
            dense: The dense model.
            clock: The clock of the turns.
            without: The model with its tables at the same place that does not prefetch; None without such a model.
        """
        times, config, model = self.times(), self.config, self.model
        low, middle, high = (float(value) for value in np.quantile(times, QUANTILES))
        ratios = [round(float(value), 3) for value in np.quantile(times / dense.times(), QUANTILES)]
        device = next(model.parameters()).device
        of_row = None if self.form is None else functools.partial(row_bytes, self.form, dtype=torch.float32)
        counted = account_of(meta_model(config, model.vocab_size), self.context, of_row)
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
            **self._of_tables(without),
        )

    def _of_tables(self, without: _Contender | None) -> dict[str, Any]:
        if self.place is None and self.form is None:
            return {}
        tokens, (_, read) = self.batch * self.steps, self.turns[False][-1]
        fields: dict[str, Any] = {"form": self.form}
        fields |= {f"{source}_bytes_per_token": round(getattr(read, source) / tokens, 1) for source in SOURCES}
        if self.place is None:
            return fields
        fields |= {
            "table": self.place.label,
            "cold_ratio_p50": _median(self.times(True) / self.times()),
            "hits": None if self.place.policy is None else round(read.hits / read.rows, 4),
        }
        for is_cold, prefix in ((False, ""), (True, "cold_")):
            fields[f"{prefix}wait_us_per_token"] = _median(1e6 * self.waits(is_cold) / self.batch)
            if self.place.prefetch:
                assert without is not None
                fields[f"{prefix}prefetch_time_ratio"] = _median(self.times(is_cold) / without.times(is_cold))
                fields[f"{prefix}prefetch_wait_ratio"] = _median(self.waits(is_cold) / without.waits(is_cold))
        return fields


def rows(speeds: Iterable[DecodeSpeed]) -> list[dict[str, object]]:
    """Return the speeds as records, one per model and batch."""
    return [asdict(speed) for speed in speeds]


def _median(values: np.ndarray) -> float:
    return round(float(np.median(values)), 3)


def _places(config: ModelConfig, place: Place) -> list[Place]:
    """Return the places of a model's tables that are measured: none without tables, with and without prefetching."""
    if not config.has_tables:
        return []
    follows = rows_follow_ids(meta_model(config, config.size.vocab_size or VOCAB))
    return [place, replace(place, prefetch=True)] if follows else [place]


def _built(
    config: ModelConfig, device: torch.device, place: Place | None, form: RowForm | None, path: Path
) -> Transformer:
    """Build a model with its tables at a place; `path` is the file in which they are stored there."""
    built_on = device if form is None and place is None else torch.device("cpu")
    model = models.build(config, config.size.vocab_size or VOCAB, seed=0, device=built_on).eval()
    if form is not None:
        reduce_tables(model, form)
    if place is None:
        return model.to(device)
    torch.save({"model": model.state_dict()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet cannot leave memory
    saved = torch.load(path, weights_only=True, mmap=True)["model"]
    stored = load_stored(config, model.vocab_size, saved, path, form, place)
    text = torch.randint(model.vocab_size, (16, 128), generator=torch.Generator().manual_seed(1))
    counts = popularity.counts(stored, [(text, torch.zeros_like(text))]) if place.policy == "static" else None
    add_caches(stored, place, counts)
    return stored.to(device)


def _clock(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
