"""The cost of evaluation without the model: seconds to build the requests, and to score one more checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from suite.cells import EvalConfig
from suite.evaluate import catalog, presets
from suite.evaluate.datasets import DataRoot
from suite.evaluate.harness import Prepared, prepare, scores_of
from suite.evaluate.oracle import Knowing

REPEATS = 3

Seconds = tuple[float, float]
"""(wall-clock, CPU time of this process); they differ when other work runs on the machine"""
Result = TypeVar("Result")


def overhead(data_root: Path) -> dict[str, Seconds]:
    """Measure this process with a model that answers immediately.

    Returns:
        `mmlu_build_s`: reading MMLU and building its 5-shot requests; `quick_build_s`: the same for the `quick` preset;
        `quick_checkpoint_s`: scoring one more checkpoint on that preset, the fastest of a few.
    """
    sources = catalog.Sources(None, DataRoot(data_root))
    _, mmlu_built = _timed(lambda: prepare(EvalConfig(tasks=("mmlu",), num_fewshot=5), sources))
    quick, quick_built = _timed(lambda: [prepare(config, sources) for config in presets.preset("quick")])
    _score(quick)
    rounds = [_timed(lambda: _score(quick))[1] for _ in range(REPEATS)]
    return {"mmlu_build_s": mmlu_built, "quick_build_s": quick_built, "quick_checkpoint_s": min(rounds)}


def _score(evaluations: list[Prepared]) -> None:
    for prepared in evaluations:
        scores_of(Knowing(prepared.loaded.tasks, right=True), prepared)


def _timed(work: Callable[[], Result]) -> tuple[Result, Seconds]:
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - clock, time.process_time() - cpu)
