"""Where jobs run: each is one process of this machine, started through submitit, given a run directory's path."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from suite.launch.worker import Scoring, run_cell

TIME_LIMIT_MIN = 30 * 24 * 60
"""submitit ends a local job after two minutes unless told otherwise; a cell may train for weeks."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(run_path: Path, scoring: Scoring, threads: int, gpu: int | None) -> submitit.Job[str]:
    """Start `run_cell(run_path, scoring)` in a process of its own and return at once.

    Args:
        run_path: the run's directory; logs and submitit's files go to a fresh folder in its `logs`.
        scoring: what its scoring may use.
        threads: CPU threads of the process.
        gpu: the one GPU it may see; None: no GPU.
    """
    # A folder for each start: submitit names files by process id, which comes round again.
    folder = run_path.resolve() / "logs" / uuid.uuid4().hex[:8]
    executor = submitit.LocalExecutor(folder)
    gpus = {} if gpu is None else {"gpus_per_node": 1, "visible_gpus": (gpu,)}
    executor.update_parameters(timeout_min=TIME_LIMIT_MIN, stderr_to_stdout=True, **gpus)
    with _environment(dict.fromkeys(THREAD_VARIABLES, str(threads))):
        return executor.submit(run_cell, run_path.resolve(), scoring)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
