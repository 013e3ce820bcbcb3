"""Speed and memory of whole training steps per family and table size.

The models take turns within every round, and only ratios to dense within a round are compared (p20, p50 and p80 over
rounds), because machines are shared and noisy. With one CPU thread its CPU time is measured, which other processes
hardly affect; otherwise wall-clock time. Every model with a table is measured twice: with row-wise updates, as in
sweeps, and with gradients of the table's size (`table_optimizer: dense`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.models.accounting import account
from suite.plan.live_bytes import LiveBytes
from suite.records import RunDir
from suite.train.loop import Trainer


@dataclass(frozen=True)
class StepSpeed:
    """The training step of one model.

    `step_ms` and `tokens_per_s` are medians over rounds, the ratios those of tokens per second to dense in the same
    round, and `peak_bytes` the peak of live tensors in bytes, weights and moments included. `ffn_hidden` is None for
    the width of the base; `optimizer` is that of the table, or None.
    """

    family: str
    base: str
    ffn_hidden: int | None
    half_keys: int | None
    memory_rows: int
    optimizer: str | None
    threads: int
    step_ms: float
    tokens_per_s: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    macs_ratio: float
    peak_bytes: int


def contenders(cells: Iterable[Cell], half_keys: Sequence[int] = ()) -> list[Cell]:
    """Return one cell of every distinct model of the smallest base, dense first.

    Args:
        cells: The cells to choose from; of equal models the first is taken.
        half_keys: Sides of the tables to measure; empty: those of the cells.

    Returns:
        The cells, with each table size and each table optimizer.

    Raises:
        UserError: A model cannot have a table of this size.
    """
    distinct: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        for variant in _variants(cell, half_keys):
            distinct.setdefault((variant.model.model_dump_json(), variant.train.table_optimizer), variant)
    ordered = sorted(distinct.values(), key=lambda cell: cell.model.family != "dense")
    return [cell for cell in ordered if cell.model.base == ordered[0].model.base]


def _variants(cell: Cell, half_keys: Sequence[int]) -> Iterator[Cell]:
    """Yield the cell with each table size and each table optimizer; unchanged if its model has no table."""
    own = cell.model.table_side
    if own is None:
        yield cell
        return
    for count in half_keys or (own,):
        model = cell.model.model_copy(update={"half_keys": count})
        for _, value, allowed in model.problems():
            raise UserError(f"--half-keys: got {value}, allowed: {allowed}")
        for optimizer in ("row_wise", "dense"):
            train = cell.train.model_copy(update={"table_optimizer": optimizer})
            yield cell.model_copy(update={"model": model, "train": train})


def step_speeds(models: Sequence[Cell], cache: Path, rounds: int = 8, steps: int = 4) -> list[StepSpeed]:
    """Measure the training steps of models that take turns.

    Args:
        models: One cell per model; ratios are to the first.
        cache: Folder of tokenized corpora.
        rounds: Rounds in which every model takes one turn; one more precedes them as a warm-up.
        steps: Training steps per turn.

    Returns:
        One speed per model, in order.
    """
    prepared = {cell.data.model_dump_json(): prepare(cell.data, cache) for cell in models}
    corpora = [prepared[cell.data.model_dump_json()] for cell in models]
    with TemporaryDirectory() as folder:

        def new_trainer(number: int) -> Trainer:
            cell, run = models[number], RunDir(Path(folder) / str(number))
            run.path.mkdir(exist_ok=True)
            return Trainer(cell, corpora[number], run)

        peaks = [_peak_bytes(partial(new_trainer, number)) for number in range(len(models))]
        trainers = [new_trainer(number) for number in range(len(models))]
        one_thread = all(trainer.cell.threads == 1 and trainer.device.type == "cpu" for trainer in trainers)
        clock = time.process_time if one_thread else time.perf_counter
        turns = [[_seconds(trainer, steps, clock) for trainer in trainers] for _ in range(rounds + 1)]
    seconds = np.array(turns[1:])
    speed = np.array([steps * cell.train.batch_rows * cell.data.seq_len for cell in models]) / seconds
    ratios = np.quantile(speed / speed[:, :1], (0.2, 0.5, 0.8), axis=0)
    macs = [
        account(cell.model, corpus.vocab_size, cell.data.seq_len).macs_total
        for cell, corpus in zip(models, corpora, strict=True)
    ]
    return [
        StepSpeed(
            family=cell.model.family,
            base=cell.model.base,
            ffn_hidden=cell.model.ffn_hidden,
            half_keys=(half_keys := cell.model.table_side),
            memory_rows=(half_keys or 0) ** 2,
            optimizer=cell.train.table_optimizer if half_keys else None,
            threads=cell.threads,
            step_ms=round(1e3 * float(np.median(seconds[:, index])) / steps, 3),
            tokens_per_s=round(float(np.median(speed[:, index])), 1),
            ratio_p20=round(float(ratios[0, index]), 3),
            ratio_p50=round(float(ratios[1, index]), 3),
            ratio_p80=round(float(ratios[2, index]), 3),
            macs_ratio=round(macs[index] / macs[0], 3),
            peak_bytes=peaks[index],
        )
        for index, cell in enumerate(models)
    ]


def _peak_bytes(make: Callable[[], Trainer]) -> int:
    """Return the peak of live tensors in bytes while a trainer is made and takes two steps."""
    with LiveBytes() as live:
        trainer = make()
        for _ in range(2):  # the first step allocates the moments
            trainer.train_step()
    return live.peak


def rows(speeds: Iterable[StepSpeed]) -> list[dict[str, object]]:
    """Return the speeds as records, one per model."""
    return [asdict(speed) for speed in speeds]


def _seconds(trainer: Trainer, steps: int, clock: Callable[[], float]) -> float:
    """Return the seconds of `steps` training steps."""
    started = clock()
    for _ in range(steps):
        trainer.train_step()
    return clock() - started
