"""What evaluation costs beside the model: seconds to build requests, and per further checkpoint to score them."""

from __future__ import annotations

import time
from pathlib import Path

from suite.cells import EvalConfig
from suite.evaluate import catalog, presets
from suite.evaluate.data import DataRoot
from suite.evaluate.harness import prepare, scores_of
from suite.evaluate.oracle import Knowing

REPEATS = 3


def overhead(data_root: Path) -> dict[str, float]:
    """Seconds of this process, with a model that answers at once.

    mmlu_build_s: reading MMLU and building its 5-shot requests; quick_build_s: the same for the `quick` preset;
    quick_checkpoint_s: scoring one more checkpoint on that preset, the best of a few.
    """
    sources = catalog.Sources(None, DataRoot(data_root))
    started = time.perf_counter()
    prepare(EvalConfig(tasks=("mmlu",), num_fewshot=5), sources)
    mmlu_built = time.perf_counter()
    prepared = [prepare(config, sources) for config in presets.preset("quick")]
    quick_built = time.perf_counter()
    rounds = []
    for _ in range(1 + REPEATS):
        before = time.perf_counter()
        for tasks in prepared:
            scores_of(Knowing(tasks.loaded.tasks, right=True), tasks)
        rounds.append(time.perf_counter() - before)
    return {
        "mmlu_build_s": mmlu_built - started,
        "quick_build_s": quick_built - mmlu_built,
        "quick_checkpoint_s": min(rounds[1:]),
    }
