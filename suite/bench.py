"""Speed of whole training steps per family, measured side by side in one run.

Machines are shared and noisy, so the models take turns within every round and only ratios to dense within a round
are compared: p20, p50 and p80 of them over rounds. Shapes: B rows, T positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from suite.cells import Cell
from suite.data import Corpus, prepare
from suite.models.accounting import account
from suite.records import RunDir
from suite.train.loop import Trainer


@dataclass(frozen=True)
class StepSpeed:
    """One model's training speed: tokens (positions) a second, and its ratio to dense in the same round."""

    family: str
    base: str
    half_keys: int | None
    threads: int
    tokens_per_s: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    macs_ratio: float


def distinct_models(cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of every distinct model of the smallest base, dense first."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.model.model_dump_json(), cell)
    ordered = sorted(found.values(), key=lambda cell: cell.model.family != "dense")
    return [cell for cell in ordered if cell.model.base == ordered[0].model.base]


def step_speeds(cells: Iterable[Cell], cache: Path, rounds: int = 12, steps: int = 5) -> list[StepSpeed]:
    """Train every distinct model `rounds` x `steps` steps, taking turns; ratios are to the first dense model."""
    models = distinct_models(cells)
    corpora: dict[str, Corpus] = {}
    with TemporaryDirectory() as folder:
        trainers = []
        for index, cell in enumerate(models):
            corpus = corpora.setdefault(cell.data.model_dump_json(), prepare(cell.data, cache))
            run = RunDir(Path(folder) / str(index))
            run.path.mkdir()
            trainers.append(Trainer(cell, corpus, run))
        seconds = np.array([[_seconds(trainer, steps) for trainer in trainers] for _ in range(rounds + 1)])[1:]
    tokens = np.array([steps * cell.train.batch_rows * cell.data.seq_len for cell in models])
    speed = tokens / seconds
    ratios = np.quantile(speed / speed[:, :1], (0.2, 0.5, 0.8), axis=0)
    macs = [account(cell.model, corpus.vocab_size, cell.data.seq_len).macs_total for cell in models]
    return [
        StepSpeed(
            family=cell.model.family,
            base=cell.model.base,
            half_keys=getattr(cell.model, "half_keys", None),
            threads=cell.threads,
            tokens_per_s=round(float(np.median(speed[:, index])), 1),
            ratio_p20=round(float(ratios[0, index]), 3),
            ratio_p50=round(float(ratios[1, index]), 3),
            ratio_p80=round(float(ratios[2, index]), 3),
            macs_ratio=round(macs[index] / macs[0], 3),
        )
        for index, cell in enumerate(models)
    ]


def rows(speeds: Iterable[StepSpeed]) -> list[dict[str, object]]:
    """The speeds as records, one per model."""
    return [asdict(speed) for speed in speeds]


def _seconds(trainer: Trainer, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    return time.perf_counter() - started
