"""Speed and memory of whole training steps per family and table size, measured side by side in one run.

Machines are shared and noisy, so the models take turns within every round and only ratios to dense within a round
are compared: p20, p50 and p80 of them over rounds. Where models use one CPU thread, its CPU time is measured, so that
other processes count little; elsewhere wall-clock. Every model with a table is trained twice: its table updated by
rows, as sweeps do, and through table-sized gradients (`table_optimizer: dense`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from suite.cells import Cell
from suite.data.corpus import Corpus, prepare
from suite.errors import UserError
from suite.models.accounting import account
from suite.plan.live_bytes import LiveBytes
from suite.records import RunDir
from suite.train.loop import Trainer


@dataclass(frozen=True)
class StepSpeed:
    """One model's training step: median milliseconds, tokens (positions) a second and their ratio to dense in the same
    round, and the most bytes of tensors alive at once, weights and moments included.

    `ffn_hidden` is None where it is the base's own; `optimizer` is that of the table, None where there is none.
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
    """The first cell of every distinct model of the smallest base, dense first; those with a table for each of
    `half_keys`, if any are given, and with either optimizer. UserError for half keys that a model cannot have."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        for variant in _variants(cell, half_keys):
            found.setdefault((variant.model.model_dump_json(), variant.train.table_optimizer), variant)
    ordered = sorted(found.values(), key=lambda cell: cell.model.family != "dense")
    return [cell for cell in ordered if cell.model.base == ordered[0].model.base]


def _variants(cell: Cell, half_keys: Sequence[int]) -> Iterator[Cell]:
    own = getattr(cell.model, "half_keys", None)
    if own is None:
        yield cell
        return
    for count in half_keys or (own,):
        model = cell.model.model_copy(update={"half_keys": count})
        for _, given, allowed in model.problems():
            raise UserError(f"--half-keys: got {given}, allowed: {allowed}")
        for optimizer in ("row_wise", "dense"):
            train = cell.train.model_copy(update={"table_optimizer": optimizer})
            yield cell.model_copy(update={"model": model, "train": train})


def step_speeds(models: Sequence[Cell], cache: Path, rounds: int = 8, steps: int = 4) -> list[StepSpeed]:
    """Train every model `rounds` x `steps` steps, taking turns; ratios are to the first one."""
    corpora: dict[str, Corpus] = {}
    for cell in models:
        corpora.setdefault(cell.data.model_dump_json(), prepare(cell.data, cache))
    with TemporaryDirectory() as folder:

        def trainer(number: int) -> Trainer:
            cell, run = models[number], RunDir(Path(folder) / str(number))
            run.path.mkdir(exist_ok=True)
            return Trainer(cell, corpora[cell.data.model_dump_json()], run)

        peaks = []
        for number in range(len(models)):
            with LiveBytes() as live:
                tried = trainer(number)
                for _ in range(2):  # moments are made in the first
                    tried.train_step()
            peaks.append(live.peak)
            del tried
        trainers = [trainer(number) for number in range(len(models))]
        alone = all(each.cell.threads == 1 and each.device.type == "cpu" for each in trainers)
        clock = time.process_time if alone else time.perf_counter
        seconds = np.array([[_seconds(each, steps, clock) for each in trainers] for _ in range(rounds + 1)])[1:]
    tokens = np.array([steps * cell.train.batch_rows * cell.data.seq_len for cell in models])
    speed = tokens / seconds
    ratios = np.quantile(speed / speed[:, :1], (0.2, 0.5, 0.8), axis=0)
    macs = [
        account(cell.model, corpora[cell.data.model_dump_json()].vocab_size, cell.data.seq_len).macs_total
        for cell in models
    ]
    return [
        StepSpeed(
            family=cell.model.family,
            base=cell.model.base,
            ffn_hidden=cell.model.ffn_hidden,
            half_keys=(half_keys := getattr(cell.model, "half_keys", None)),
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


def rows(speeds: Iterable[StepSpeed]) -> list[dict[str, object]]:
    """The speeds as records, one per model."""
    return [asdict(speed) for speed in speeds]


def _seconds(trainer: Trainer, steps: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(steps):
        trainer.train_step()
    return clock() - started
